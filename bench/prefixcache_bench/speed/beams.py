"""What beam search asks of the service: the part of a step that its calls take.

```
step   forward ── logits ── choice ──┬─ commits, forks, releases: one message
                                     └─ room for the forks: another one
```
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any, Final

from prefixcache.types import TableUpdate
from prefixcache_worker.beam_search import BeamSearch
from prefixcache_worker.engine import Engine
from prefixcache_worker.request import Request, Searched
from prefixcache_worker.store import Claim, Commit, Fork, Settled, SharedStore

WIDTH: Final = 4
PROMPT_TOKENS: Final = 1000
SKIPPED_STEPS: Final = 3


class TimedStore(SharedStore):
    """A store that knows how long its calls took, their answers included."""

    spent_s = 0.0

    def settle(
        self, commits: Sequence[Commit], releases: Sequence[Claim], forks: Sequence[Fork] = ()
    ) -> Settled:
        """Pass it on, and time it."""
        began = time.perf_counter()
        settled = super().settle(commits, releases, forks)
        self.spent_s += time.perf_counter() - began
        return settled

    def extend(
        self, claims: Sequence[tuple[Claim, int]], *, wait_s: float
    ) -> list[Future[TableUpdate]]:
        """Pass it on, and time it until it is answered."""
        began = time.perf_counter()
        answers = super().extend(claims, wait_s=wait_s)
        futures.wait(answers, 1.0)
        self.spent_s += time.perf_counter() - began
        return answers


def steps_of(made: Engine, name: str, prompt: list[int], count: int) -> list[tuple[float, float]]:
    """Search `count` tokens from a prompt; for each full step its seconds, and those of its calls.

    The engine's own store is replaced by one that keeps the time.
    """
    known = made.membership.shared
    assert known is not None
    store = known if isinstance(known, TimedStore) else TimedStore(known.session, known.pool)
    made.membership.shared = store
    made.submit(
        Request(name, prompt, count, stop_ids=(), beams=BeamSearch(WIDTH, 0.0, "never"), n=WIDTH)
    )
    found = []
    while not made.idle:
        store.spent_s, began = 0.0, time.perf_counter()
        events = made.step()
        spent = time.perf_counter() - began
        if any(isinstance(event, Searched) and event.num_tokens > 1 for event in events):
            found.append((spent, store.spent_s))
        if made.stalled and not made.idle:
            made.wait(1.0)
    return found[SKIPPED_STEPS:-1]


def measure_beams(
    made: Engine, rounds: int, steps: int, draw: random.Random
) -> dict[str, list[float] | int]:
    """Search behind fresh prompts; seconds of all steps, and of their calls."""
    found = []
    for number in range(rounds):
        prompt = [draw.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)]
        found += steps_of(made, f"beams {number}", prompt, steps + SKIPPED_STEPS + 2)
    return {
        "width": WIDTH,
        "prompt_tokens": PROMPT_TOKENS,
        "step_s": [step for step, _ in found],
        "calls_s": [calls for _, calls in found],
    }


def fields(measured: dict[str, Any]) -> dict[str, Any]:
    """Turn what was measured into min, median and max."""
    steps, calls = measured["step_s"], measured["calls_s"]
    shares = [100 * call / step for step, call in zip(steps, calls, strict=True)]

    def spread(values: list[float]) -> dict[str, float]:
        ranked = sorted(values)
        return {"min": ranked[0], "median": ranked[len(ranked) // 2], "max": ranked[-1]}

    return {
        "width": measured["width"],
        "prompt_tokens": measured["prompt_tokens"],
        "steps": len(steps),
        "step_ms": spread([1e3 * step for step in steps]),
        "calls_ms": spread([1e3 * call for call in calls]),
        "calls_percent": spread(shares),
    }
