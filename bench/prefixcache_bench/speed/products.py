"""Products of a layer in bfloat16: our C library beside PyTorch's (oneDNN), for 1 to 1,000 rows.

    python -m prefixcache_bench.speed.products [--rounds 15] [--threads 1] [--seed 0] [--publish]

All compute what a layer of SmolLM2-135M multiplies: qkv, out, `silu(gate) * up`, down.  Ours keeps
float32 between them, PyTorch bfloat16; ours is there with weights of eight bits, too.  Six layers
take turns, so that weights are not in the processor's nearest caches already; so do the
sides, layer by layer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody knows
from torch import Tensor

from prefixcache_bench.reports.figures import publish
from prefixcache_kernels.cpu import library
from prefixcache_kernels.cpu.linear import Matrix, pack, quantize

DOCUMENT: Final = Path("docs/kernels.md")
HIDDEN, QKV, WIDTH = 576, 960, 1536
LAYERS: Final = 6
ROWS: Final = (1, 4, 16, 64, 256, 1000)

Layer = Callable[[Tensor, Tensor, Tensor], object]
"""Multiplies rows of the hidden size twice, and rows of the wide one."""


def layer(generator: torch.Generator) -> tuple[Layer, ...]:
    """Make a layer of random weights: for us, for us in eight bits, and for PyTorch."""

    def weight(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=generator).to(torch.bfloat16)

    qkv, out, down = weight(QKV, HIDDEN), weight(HIDDEN, HIDDEN), weight(HIDDEN, WIDTH)
    gate_up = weight(2 * WIDTH, HIDDEN)

    def ours(order: Callable[..., Tensor]) -> Layer:
        made = (
            Matrix(order(qkv), HIDDEN, QKV),
            Matrix(order(out), HIDDEN, HIDDEN),
            Matrix(order(gate_up, gated=True), HIDDEN, WIDTH, gated=True),
            Matrix(order(down), WIDTH, HIDDEN),
        )
        return lambda x, y, wide: [
            one.multiply(rows) for one, rows in zip(made, (x, y, y, wide), strict=True)
        ]

    def pytorch(x: Tensor, y: Tensor, wide: Tensor) -> object:
        gate, up = F.linear(y, gate_up).chunk(2, dim=1)
        return F.linear(x, qkv), F.linear(y, out), F.silu(gate) * up, F.linear(wide, down)

    return ours(pack), ours(quantize), pytorch


def measure(num_rows: int, rounds: int, generator: torch.Generator) -> list[list[float]]:
    """Time a layer of all sides; give milliseconds of each."""
    layers = [layer(generator) for _ in range(LAYERS)]
    rows = [torch.randn(num_rows, size, generator=generator) for size in (HIDDEN, HIDDEN, WIDTH)]
    given = (rows, rows, [one.to(torch.bfloat16) for one in rows])
    taken: list[list[float]] = [[] for _ in given]
    for turn in range(-2, rounds):
        for sides in layers:
            for side in (0, 1, 2) if turn % 2 else (2, 1, 0):
                began = time.perf_counter()
                sides[side](*given[side])
                if turn >= 0:
                    taken[side].append(1e3 * (time.perf_counter() - began))
    return taken


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m prefixcache_bench.speed.products")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--publish", action="store_true", help=f"put the table into {DOCUMENT}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(options.seed)
    lines = [
        f"threads: {options.threads}; our library: {library.describe()}",
        f"{'a layer, ms: min / median / max':34}{'ours':>24}{'ours, int8':>24}{'PyTorch':>24}"
        f"{'ours/PyTorch':>14}",
    ]
    print("\n".join(lines))
    for num_rows in ROWS:
        taken = measure(num_rows, options.rounds, generator)
        told = (
            " / ".join(f"{of(times):.2f}" for of in (min, statistics.median, max))
            for times in taken
        )
        ratio = statistics.median(taken[0]) / statistics.median(taken[2])
        sides = "".join(f"{one:>24}" for one in told)
        lines.append(f"{f'{num_rows:,} rows':34}{sides}{ratio:>14.2f}")
        print(lines[-1], flush=True)
    if options.publish:
        command = f"$ python -m prefixcache_bench.speed.products --threads {options.threads}"
        publish(DOCUMENT, "products", "\n".join([command, *lines]))


if __name__ == "__main__":
    main()
