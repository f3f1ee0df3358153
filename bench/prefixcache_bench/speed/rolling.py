"""The rolling index: what a look-up at all offsets, a run that comes and one that goes cost.

    python -m prefixcache_bench.speed.rolling [--blocks N] [--quick] [--publish]

Blocks of 16 random tokens of a vocabulary of 50,000, stored in runs of 64.  Prompts of 4,096
tokens: one of which nothing is stored, one that is stored whole, 7 tokens later, and one of a
single token over and over, which is stored as well: every offset fits.  Medians of rounds.
"""

from __future__ import annotations

import argparse
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from prefixcache.core.rolling_index import RollingIndex
from prefixcache.types import BlockId, Namespace
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.speed.signals import ending_in_order

DOCUMENT: Final = Path("docs/implementation.md")
SIZE: Final = 16
RUN: Final = 64
PROMPT: Final = 4096
VOCABULARY: Final = 50_000
HERE: Final = Namespace("m")


def resident() -> int:
    """Give the bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def took(work: Callable[[], object], rounds: int) -> float:
    """Give the median time of some rounds, in ms."""
    seen = []
    for _ in range(rounds):
        began = perf_counter()
        work()
        seen.append(1e3 * (perf_counter() - began))
    return median(seen)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and publish if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.rolling", description=__doc__
    )
    parser.add_argument("--blocks", type=int, default=2_000_000, help="that are indexed")
    parser.add_argument("--quick", action="store_true", help="20,000 blocks, few rounds")
    parser.add_argument("--publish", action="store_true", help=f"put the table into {DOCUMENT}")
    options = parser.parse_args(argv)
    num = 20_000 if options.quick else options.blocks
    num -= num % RUN
    rounds = 5 if options.quick else 200
    random = np.random.default_rng(7)

    def some(count: int) -> NDArray[np.uint32]:
        return random.integers(0, VOCABULARY, count, np.uint32)

    spare = PROMPT // SIZE + RUN
    before = resident()
    index = RollingIndex(num + 2 * spare, SIZE, random.bytes(16))
    whole = some(PROMPT)
    same = np.full(PROMPT, 17, np.uint32)
    for tokens, first in ((whole, num), (same, num + spare)):
        blocks = array("i", range(first, first + PROMPT // SIZE))
        index.stored(HERE, None, tokens.tobytes(), blocks)
    for first in range(0, num, RUN):
        parent = BlockId(first - 1) if first % (16 * RUN) else None
        index.stored(
            HERE, parent, some(RUN * SIZE).tobytes(), array("i", range(first, first + RUN))
        )
    bytes_a_block = (resident() - before) / (num + PROMPT // SIZE)
    shifted = np.concatenate([some(7), whole])[:PROMPT]
    prompts = {"nothing stored": some(PROMPT), "all stored, 7 later": shifted, "one token": same}
    lines = [f"{num:,} blocks of {SIZE} tokens: {bytes_a_block:.0f} bytes a block, of which "
             f"{4 * SIZE} are its tokens; ms", ""]  # fmt: skip
    for name, prompt in prompts.items():
        packed = prompt.tobytes()
        found = sum(len(donor.blocks) for donor in index.search(HERE, packed))
        ms = took(lambda packed=packed: index.search(HERE, packed), rounds)  # type: ignore[misc]
        lines.append(f"look-up of {PROMPT:,} tokens, {name:<22}{ms:>8.3f}   {found} blocks found")
    for count in (1, RUN):
        blocks = array("i", range(num + spare - count, num + spare))
        runs = [some(count * SIZE).tobytes() for _ in range(rounds)]
        come, go = [], []
        for run in runs:
            come.append(took(lambda run=run: index.stored(HERE, None, run, blocks), 1))  # type: ignore[misc]  # noqa: B023
            go.append(took(lambda: index.removed(HERE, blocks), 1))  # noqa: B023
        what = "a block" if count == 1 else f"{count} blocks"
        lines.append(f"{what + ' come':<48}{median(come):>8.3f}")
        lines.append(f"{what + ' go':<48}{median(go):>8.3f}")
    text = "\n".join(lines)
    print(text)
    if options.publish:
        command = "$ python -m prefixcache_bench.speed.rolling"
        publish(DOCUMENT, "rolling index", f"{command}\n{text}")
    return 0


if __name__ == "__main__":
    with ending_in_order():
        sys.exit(main())
