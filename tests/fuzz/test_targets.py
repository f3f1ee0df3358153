"""A few seconds of what `make fuzz` does for ten minutes: small changes to good inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fuzz.odd import ODD
from fuzz.run import LEAST, into_sockets, over_the_wire
from fuzz.seeds import seeds
from fuzz.strangers import CONFIGS, LINES, LOGGED, WORKER_LINES
from fuzz.targets import TARGETS, States
from service.service_process import ServiceProcess, running, sizes

CORPUS = Path(__file__).parent / "corpus"
INPUTS = 40


def mutated(seed: bytes, random: Random) -> bytes:
    """Change a good input a little."""
    data = bytearray(seed)
    for _ in range(random.randrange(1, 6)):
        at = random.randrange(len(data) + 1)
        match random.randrange(4):
            case 0:
                data[at:at] = random.randbytes(random.randrange(1, 9))
            case 1:
                del data[at : at + random.randrange(1, 9)]
            case 2 if at < len(data):
                data[at] ^= 1 << random.randrange(8)
            case _:
                data[at : at + 4] = random.choice([b"\0" * 4, b"\xff" * 4, b"\x7f" * 4])
    return bytes(data)


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest) -> Iterator[tuple[str, Callable[[bytes], None]]]:
    run = TARGETS[request.param]()
    yield request.param, run
    if hasattr(run, "close"):
        run.close()


def test_nothing_but_what_is_promised_is_raised(
    target: tuple[str, Callable[[bytes], None]],
) -> None:
    name, run = target
    random = Random(name)
    run(b"")
    for path in sorted((CORPUS / name).glob("*")):  # what once was found
        run(path.read_bytes())
    for seed in seeds(name):
        run(seed)
        for _ in range(INPUTS):
            run(mutated(seed, random))


def test_every_single_change_of_a_manifest_is_survived() -> None:
    run = States()
    try:
        changes = [bytes([0, 0, number]) for number in range(len(States.TABLES))]
        for column, value in product(range(len(States.COLUMNS)), range(len(States.VALUES))):
            changes.append(bytes([1, column, value]))
        for change in changes:
            try:
                run(change)
            except Exception as error:
                raise AssertionError(run._change(*change)) from error
    finally:
        run.close()


STRANGE = {
    "traces": [bytes([how, form]) for form in range(len(LINES)) for how in (1, 35)],
    "conversations": [bytes([1]), bytes([3])],
    "prompts": [bytes([2 * at + 1]) for at in range(6)],
    "logged": [bytes([128 + at]) for at in range(len(LOGGED))],
    "workers": [bytes([128 + at]) for at in range(len(WORKER_LINES))],
    "identities": [b""],
    "configs": [bytes([2 * at + 1]) for at in range(len(CONFIGS))],
}


@pytest.mark.parametrize("name", STRANGE)
def test_whatever_stands_in_place_of_any_one_value_is_refused_or_sound(name: str) -> None:
    run: Any = TARGETS[name]()
    try:
        for form, where in product(STRANGE[name], range(16)):
            for by in range(where % 3, len(ODD), 3):  # `make fuzz` does the rest
                try:
                    run(form + bytes([0, where, by]))
                except Exception as error:
                    raise AssertionError(f"{form!r}: {ODD[by]!r:.60} at place {where}") from error
    finally:
        if hasattr(run, "close"):
            run.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with running(f"unix:{tmp_path}/s", *sizes(64, 4), "--log-level", "error") as service:
        yield service


def test_a_real_service_takes_anything(service: ServiceProcess) -> None:
    count, finding = over_the_wire(0.5, service.target)
    assert not finding
    more, finding = into_sockets(0.5, service.target)
    assert not finding
    assert count >= LEAST
    assert more >= LEAST
    assert service.process.poll() is None
    assert "Traceback" not in service.log()
