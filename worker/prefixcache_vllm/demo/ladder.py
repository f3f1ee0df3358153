"""First tokens, one request at a time: what nobody has computed, what another has, what one has.

```
new system prompt  ──►  vllm-1   cold        computes it
                   ──►  vllm-2   another's   reads what vllm-1 computed
                   ──►  vllm-3   another's
                   ──►  vllm-1   its own     reads what it has computed itself
```
The user's words differ from rung to rung, so that a few tokens are computed each time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from prefixcache_worker.demo.ideal import common_prefix
from prefixcache_worker.demo.record import Request

COLD, OTHERS, OWN = "cold", "another's", "its own"
QUESTIONS: Final = ("What can you do?", "Who are you?", "May I ask?", "How does this work?")


@dataclass(frozen=True, slots=True)
class Rung:
    """One request of a ladder.

    Attributes:
        kind: whose keys and values it finds.
        request: as it was answered.
        findable: tokens of its prompt that an engine had computed before.
    """

    kind: str
    request: Request
    findable: int

    @property
    def is_exact(self) -> bool:
        """Whether all was reused that could be, to the token: the last is always computed."""
        return self.request.ledger.reused >= min(self.findable, len(self.request.prompt) - 1)


def plan(engines: Sequence[str]) -> list[tuple[str, str]]:
    """Give the rungs of one ladder: which engine, and whose prefix it finds.

    >>> plan(["a", "b", "c"])
    [('a', 'cold'), ('b', "another's"), ('c', "another's"), ('a', 'its own')]
    """
    first, *others = engines
    return [(first, COLD), *((other, OTHERS) for other in others), (first, OWN)]


async def climb(
    engines: Sequence[str],
    prompts: Sequence[Sequence[int]],
    make: Callable[[int, Sequence[int]], Request],
    ask: Callable[[Request, str], Awaitable[Request]],
) -> list[Rung]:
    """Go up one ladder.

    Args:
        engines: the first one computes.
        prompts: one for each rung, all with the same beginning.
        make: makes the request of a rung.
        ask: sends it to an engine, and waits for its answer.
    """
    rungs: list[Rung] = []
    for number, ((engine, kind), prompt) in enumerate(zip(plan(engines), prompts, strict=True)):
        request = make(number, prompt)
        known = [rung.request.sequenced.stored for rung in rungs]
        packed = request.sequenced.stored
        findable = max((common_prefix(packed, other) for other in known), default=0)
        await ask(request, engine)
        rungs.append(Rung(kind, request, findable))
    return rungs


def figures(ladders: Sequence[Sequence[Rung]]) -> dict[str, Any]:
    """Give the medians of each kind, and how they compare."""
    by_kind: dict[str, list[Rung]] = {COLD: [], OTHERS: [], OWN: []}
    for ladder in ladders:
        for rung in ladder:
            by_kind[rung.kind].append(rung)
    cold = _median_ms(by_kind[COLD])
    table = {}
    for kind, rungs in by_kind.items():
        found = _median_ms(rungs)
        table[kind] = {
            "requests": len(rungs),
            "prompt_tokens": _median([len(rung.request.prompt) for rung in rungs]),
            "computed": _median(
                [len(rung.request.prompt) - rung.request.ledger.reused for rung in rungs]
            ),
            "exact": all(rung.is_exact for rung in rungs),
            "first_token_ms": found,
            "of_cold": round(found / cold, 3) if found is not None and cold else None,
        }
    return table


def _median_ms(rungs: Sequence[Rung]) -> float | None:
    return _median([rung.request.ttft_ms for rung in rungs])


def _median(values: Sequence[float]) -> float | None:
    return round(median(values), 2) if values else None
