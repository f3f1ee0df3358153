"""docs/router.py: each prompt goes to the machine that has most of it, of several to the idlest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefixcache
from patience import PATIENCE_S
from service.service_process import (
    LAYOUT,
    ROOT,
    ServiceProcess,
    environment,
    eventually,
    running,
    sizes,
)
from service.test_haulage import slots

ROUTER = ROOT / "docs" / "router.py"
SIZE = 4


class Router:
    """The example, and what it answers."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def tell(self, **what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def route(self, tokens: list[int], *, is_done: bool = True) -> tuple[str, int]:
        """Give where a prompt goes, and how much of it is there."""
        assert self.process.stdout is not None
        self.tell(id=1, model="m", tokens=tokens)
        answer = json.loads(self.process.stdout.readline())
        if is_done:
            self.tell(done=answer["machine"])
        return answer["machine"], answer["cached"]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[ServiceProcess]]:
    flags = (*sizes(64, SIZE), "--host", slots(200), "--partial", "off", "--grace", "0")
    with (
        running(f"unix:{tmp_path}/a.sock", *flags) as one,
        running(f"unix:{tmp_path}/b.sock", *flags) as two,
    ):
        yield [one, two]


@pytest.fixture
def router(machines: list[ServiceProcess]) -> Iterator[Router]:
    with subprocess.Popen(
        [sys.executable, "-W", "error", ROUTER, *(one.target for one in machines)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    ) as process:  # fmt: skip
        yield Router(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 0


def store(service: ServiceProcess, *prompts: list[int]) -> None:
    with prefixcache.connect(service.target) as client:
        session = client.attach("m", LAYOUT)
        for tokens in prompts:
            with session.acquire([*tokens, 0]) as lease:
                lease.commit(len(tokens))


def test_the_example_is_short() -> None:
    assert len(ROUTER.read_text().splitlines()) <= 100


def test_a_prompt_goes_to_the_machine_that_has_most_of_it_and_to_the_idlest_of_several(
    machines: list[ServiceProcess], router: Router
) -> None:
    one, two = machines
    chat = [*range(100, 140)]
    store(one, chat[:20])
    store(two, chat)
    eventually(lambda: router.route([*chat, 1]) == (two.target, 40))
    eventually(lambda: router.route([*chat[:20], 1])[1] == 20)
    first = router.route([*range(500, 520)], is_done=False)
    second = router.route([*range(600, 620)], is_done=False)
    assert {first, second} == {(one.target, 0), (two.target, 0)}
    router.tell(done=first[0])
    assert router.route([*range(700, 720)])[0] == first[0]
    with prefixcache.connect(two.target) as client:
        client.reset(prefixcache.Namespace("m"))
    eventually(lambda: router.route([*chat, 1]) == (one.target, 20))
    one.process.kill()
    eventually(lambda: router.route([*chat, 1]) == (two.target, 0))


def test_what_went_below_the_pool_is_still_routed_to_where_it_lies(
    machines: list[ServiceProcess], router: Router
) -> None:
    two = machines[1]
    eventually(lambda: "porter at work" in two.log())
    chat = [*range(100, 120)]
    store(two, chat)
    eventually(lambda: router.route([*chat, 1]) == (two.target, 20))
    with prefixcache.connect(two.target) as client:
        for first in range(1000, 100_000, 1000):
            store(two, [*range(first, first + 3 * SIZE)])
            assert router.route([*chat, 1]) == (two.target, 20)
            if not client.lookup(prefixcache.Namespace("m"), [*chat, 0]).num_hit:
                break
        assert not client.lookup(prefixcache.Namespace("m"), [*chat, 0]).num_hit
    assert router.route([*chat, 1]) == (two.target, 20)
