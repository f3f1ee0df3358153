"""What the checks before the kernels cost: two checkouts' operations, in turn in the same minutes.

    python -m prefixcache_bench.speed.gate [--base ../base] [--rounds 200] [--quick]

`--base` is a checkout of another commit; without it this one is compared with itself, which says
how far the figures can be trusted.  Each side is a process of its own with one thread, and they
take turns, a step of all layers at a time, on batches so small that little else is done.  Times are
processor time.  A ratio above 1 says that this checkout is slower.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, cast

from prefixcache_bench.speed.signals import ending_in_order

LAYERS: Final = 30
HEADS, KV_HEADS, DIM, BLOCK_SIZE, NUM_SEQS, CONTEXT = 9, 3, 64, 16, 8, 64
ROOT: Final = Path(__file__).resolve().parents[3]
CASES: Final = ("attend", "share", "store")


def steps() -> dict[str, Callable[[], None]]:
    """Give, for each case, what one step does: one call in each layer.  The child's side."""
    import torch

    from prefixcache_kernels import (
        GroupedPlan,
        GroupPlan,
        Plan,
        paged_attention,
        shared_prefix_attention,
        store_kv,
    )

    torch.set_num_threads(1)
    noise = torch.Generator().manual_seed(0)
    width = CONTEXT // BLOCK_SIZE
    num_blocks = NUM_SEQS * width
    pool = torch.randn(LAYERS, 2, num_blocks, BLOCK_SIZE, KV_HEADS, DIM, generator=noise)
    layers = [(keys, values) for keys, values in pool]
    query = torch.randn(NUM_SEQS, HEADS, DIM, generator=noise)
    key, value = torch.randn(2, NUM_SEQS, KV_HEADS, DIM, generator=noise)
    tables = torch.randperm(num_blocks, generator=noise).view(NUM_SEQS, width).int()
    tables[:, 0] = tables[0, 0]
    starts = torch.arange(NUM_SEQS + 1, dtype=torch.int32)
    contexts = torch.full((NUM_SEQS,), CONTEXT, dtype=torch.int32)
    slots = tables[:, -1].long() * BLOCK_SIZE + BLOCK_SIZE - 1
    groups = GroupPlan.build(tables, [width - 1] * NUM_SEQS)
    batch, scale = (tables, starts, contexts), DIM**-0.5
    plan = Plan.build(*batch, BLOCK_SIZE)
    grouped = GroupedPlan.build(*batch, BLOCK_SIZE, groups)

    def attend() -> None:
        for keys, values in layers:
            paged_attention(query, keys, values, *batch, scale=scale, plan=plan)

    def share() -> None:
        for keys, values in layers:
            shared_prefix_attention(query, keys, values, *batch, groups, scale=scale, plan=grouped)

    def store() -> None:
        for keys, values in layers:
            store_kv(key, value, keys, values, slots)

    return {"attend": attend, "share": share, "store": store}


def serve() -> None:
    """Do the step of each case that is named, and say how long it took, until there is no more."""
    known = steps()
    for line in sys.stdin:
        step = known[line.strip()]
        began = time.process_time_ns()
        step()
        sys.stdout.write(f"{(time.process_time_ns() - began) / LAYERS / 1e3}\n")
        sys.stdout.flush()


class Side:
    """A checkout's process."""

    def __init__(self, root: Path) -> None:
        path = os.pathsep.join(str(root / part) for part in (".", "kernels"))
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve()), "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )

    def call(self, case: str) -> float:
        """Give microseconds of one call, the mean of a step."""
        told, heard = (cast("IO[str]", pipe) for pipe in (self.process.stdin, self.process.stdout))
        told.write(f"{case}\n")
        told.flush()
        return float(heard.readline())

    def close(self) -> None:
        """End the process."""
        cast("IO[str]", self.process.stdin).close()
        self.process.wait()


def measure(options: argparse.Namespace) -> None:
    """Measure both sides in turn, and print."""
    rounds = 5 if options.quick else options.rounds
    sides = {"base": Side(options.base.resolve()), "here": Side(ROOT)}
    print(f"microseconds of a call, lower quartile / median of {rounds} steps of {LAYERS} layers")
    print(f"{'':8}{'base':>18}{'here':>18}{'ratio of quartiles':>20}{'of medians':>12}")
    for case in CASES:
        took: dict[str, list[float]] = {"base": [], "here": []}
        for turn in range(rounds + 5):
            for name in sorted(sides, reverse=bool(turn % 2)):
                took[name].append(sides[name].call(case))
        cut = {name: statistics.quantiles(times[5:], n=4)[:2] for name, times in took.items()}
        shown = [f"{low:.2f} / {middle:.2f}" for low, middle in (cut["base"], cut["here"])]
        low, middle = (cut["here"][i] / cut["base"][i] for i in (0, 1))
        print(f"{case:8}{shown[0]:>18}{shown[1]:>18}{low:>20.3f}{middle:>12.3f}")
    for side in sides.values():
        side.close()


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.gate", description=__doc__
    )
    parser.add_argument("--base", type=Path, default=ROOT, help="a checkout of another commit")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="short: five rounds")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve()
        return
    with ending_in_order():
        measure(options)


if __name__ == "__main__":
    main()
