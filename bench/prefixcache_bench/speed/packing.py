"""What it costs to pack a prompt: every kind that `pack` takes, beside the plain conversion.

The plain one looks at nothing: it would take -1 for 4,294,967,295 and True for 1.  Both take turns.

    python -m prefixcache_bench.speed.packing [--tokens 32768] [--rounds 60] [--seed 0]
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefixcache.types import pack

CALLS = 20
VOCABULARY = 49_152


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of token ids, and how to convert it without looking at it."""

    name: str
    tokens: Any
    plain: Callable[[Any], bytes]


def cases(num_tokens: int, seed: int) -> list[Case]:
    """Give the same token ids in every form."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, num_tokens)
    return [
        Case("numpy uint32", ids.astype(np.uint32), lambda ids: bytes(ids.tobytes())),
        Case("numpy int32", ids.astype(np.int32), lambda ids: bytes(ids.tobytes())),
        Case("numpy int64", ids, lambda ids: bytes(ids.astype(np.uint32).tobytes())),
        Case("array('i')", array("i", ids.tolist()), lambda ids: bytes(ids.tobytes())),
        Case("list", ids.tolist(), lambda ids: array("I", ids).tobytes()),
        Case("tuple", tuple(ids.tolist()), lambda ids: array("I", ids).tobytes()),
    ]


def microseconds(convert: Callable[[Any], bytes], tokens: Any) -> float:
    """Time some calls; give the time of one."""
    began = time.perf_counter()
    for _ in range(CALLS):
        convert(tokens)
    return (time.perf_counter() - began) / CALLS * 1e6


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m prefixcache_bench.speed.packing")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="short: five rounds")
    options = parser.parse_args()
    rounds = 5 if options.quick else options.rounds
    print(f"packing {options.tokens:,} tokens, microseconds: min / median / max of {rounds} rounds")
    print(f"{'given as':14}{'pack':>24}{'plain':>24}{'ratio of medians':>18}")
    for case in cases(options.tokens, options.seed):
        taken: dict[str, list[float]] = {"pack": [], "plain": []}
        for _ in range(rounds):
            taken["pack"].append(microseconds(pack, case.tokens))
            taken["plain"].append(microseconds(case.plain, case.tokens))
        shown = [
            " / ".join(f"{of(times):.1f}" for of in (min, statistics.median, max))
            for times in taken.values()
        ]
        ratio = statistics.median(taken["pack"]) / statistics.median(taken["plain"])
        print(f"{case.name:14}{shown[0]:>24}{shown[1]:>24}{ratio:>18.2f}")


if __name__ == "__main__":
    main()
