"""What it costs to hold answers to a grammar: decoding so, and without, taking turns.

```
step   which tokens may come (llguidance) ── forward ── ruled out what may not ── choice ── forced
       └─ a mask for each answer                        └─ O(vocabulary) each     tokens run along
```
The grammar is a list of texts that cannot end too early: most of its tokens are anything but a
quote, some are forced.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any, Final

from prefixcache_worker.engine import Engine
from prefixcache_worker.grammar import Grammar, Value
from prefixcache_worker.request import Request, Token
from prefixcache_worker.sampling import Sampling

BATCHES: Final = (1, 8, 16)
CONTEXT: Final = 200
SKIPPED_STEPS: Final = 3
TEXTS: Final = {"type": "array", "items": {"type": "string"}, "minItems": 1000}
WAYS: Final[dict[str, tuple[Sampling, Grammar | None]]] = {
    "free": (Sampling(), None),
    "held": (Sampling(), Grammar(Value(TEXTS))),
    "free, drawn": (Sampling(1.0, seed=1), None),
    "held, drawn": (Sampling(1.0, seed=1), Grammar(Value(TEXTS))),
}


def speed_of(
    made: Engine, name: str, prompts: list[list[int]], count: int, way: str
) -> tuple[float, float]:
    """Decode side by side; tokens per second of this thread, and those of a step."""
    how, grammar = WAYS[way]
    count += sum(map(len, prompts)) // made.chunk + 2  # the first decode while others prefill
    for number, prompt in enumerate(prompts):
        made.submit(
            Request(
                f"{name}.{number}", prompt, count, how, stop_ids=(), wait_s=0.0, grammar=grammar
            )
        )
    found: list[tuple[float, int]] = []
    while not made.idle:
        began = time.thread_time()
        events = made.step()
        spent = time.thread_time() - began
        told = [event.id for event in events if isinstance(event, Token)]
        if len(set(told)) == len(prompts):
            found.append((spent, len(told)))
        if made.stalled and not made.idle:
            made.wait(1.0)
    kept = found[SKIPPED_STEPS:]
    num_tokens = sum(tokens for _, tokens in kept)
    return num_tokens / sum(spent for spent, _ in kept), num_tokens / len(kept)


def measure_held(
    made: Engine, rounds: int, steps: int, draw: random.Random
) -> list[dict[str, Any]]:
    """Measure each way at several batch sizes; medians over the rounds."""
    rows = []
    for batch in BATCHES:
        speeds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for number in range(-1, rounds):  # the first one compiles the grammar
            prompts = [[draw.randrange(100, 40_000) for _ in range(CONTEXT)] for _ in range(batch)]
            for way in WAYS:
                found = speed_of(made, f"{way}.{batch}.{number}", prompts, steps, way)
                speeds[way] += [found] if number >= 0 else []
        medians = {
            way: statistics.median(speed for speed, _ in all_) for way, all_ in speeds.items()
        }
        each = {way: statistics.median(step for _, step in all_) for way, all_ in speeds.items()}
        rows.append(
            {
                "batch": batch,
                "tokens_per_s": medians,
                "tokens_per_step": each,
                "held_to_free": medians["held"] / medians["free"],
                "held_to_free_drawn": medians["held, drawn"] / medians["free, drawn"],
            }
        )
    return rows
