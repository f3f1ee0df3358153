"""What a client's script tells: a line of JSON for each thing that the client's users do.

Nothing of prefixcache is imported here: in the clients' environment it is not installed.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

URL, MODEL = sys.argv[1:3]
"""The base URL of the endpoint, and the model that is served."""

QUESTION = "What is the capital of France? Answer in one sentence."
LONG = "Tell me a long story about a dog that travels around the world."
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]},
        "country": {"type": "string", "enum": ["France", "Italy", "Norway"]},
        "is_capital": {"type": "boolean"},
    },
    "required": ["city", "country", "is_capital"],
    "additionalProperties": False,
}
"""A schema whose answers are short, whatever the model thinks of it."""


def about(*packages: str) -> None:
    """Say which client this is, by its packages."""
    tell(client=", ".join(f"{name} {version(name)}" for name in packages))


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Say whether something worked, and why not."""
    began_s = time.monotonic()
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told, and the next thing is tried
        where = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        tell(what=what, ok=False, why=why[-2000:])
    else:
        tell(what=what, ok=True, seconds=round(time.monotonic() - began_s, 2))


def tell(**told: Any) -> None:
    """Write a line."""
    print(json.dumps(told), flush=True)  # noqa: T201 - it is what the script is for


def must(condition: object, what: object = "") -> None:
    """Fail, if it is not so."""
    if not condition:
        raise AssertionError(what)


def must_raise(kind: type[BaseException], call: Callable[[], Any]) -> Any:
    """Give the error that a call must end with."""
    try:
        found = call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}: {str(found)[:200]}")


@contextlib.contextmanager
def leaving(within_s: float = 60.0) -> Iterator[None]:
    """Fail, if the endpoint does not see that the client leaves, or still computes its answer."""
    before = meter("clients_gone_total")
    yield
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        gone, running = meter("clients_gone_total") - before, meter("answers_running")
        if gone and not running:
            return
        time.sleep(0.05)
    raise AssertionError(f"{gone:g} clients have left, {running:g} answers are still computed")


def meter(name: str) -> float:
    """Read a number of the endpoint."""
    with urllib.request.urlopen(URL.removesuffix("/v1") + "/metrics", timeout=120) as answer:  # noqa: S310
        lines = answer.read().decode().splitlines()
    return float(
        next(line.split()[1] for line in lines if line.startswith(f"prefixcache_front_{name} "))
    )
