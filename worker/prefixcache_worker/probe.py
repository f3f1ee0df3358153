"""The probe: a network is used only if its logits on paged memory are those of plain attention.

```
plain eager attention     t t t t t t t t t t t t t ...        all at once, no cache
on the pool               ├─ cut inside a block ─┼─ more ─┼ one ┼ rest     scattered blocks
                          beside another sequence in the same batches
```
"""

from __future__ import annotations

import math
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from prefixcache.types import Layout
from prefixcache_kernels.pool import SharedPool
from prefixcache_worker.batch import Batch, Piece

BLOCK_SIZE: Final = 16
NUM_TOKENS: Final = 45
TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest accepted `distance`.  Two correct networks lie 1e-6 apart in float32; in bfloat16 1e-2 to
2e-2 apart, as far as either lies from float32."""


class Network(Protocol):
    """Something that runs batches on a pool."""

    def __call__(self, batch: Batch, pool: SharedPool, plan: Any) -> Tensor:
        """Give the logits of the batch's rows."""
        ...


def random_prompts(vocab_size: int) -> list[list[int]]:
    """Make two prompts of different lengths.  The same ones for the same vocabulary."""
    generator = torch.Generator().manual_seed(7)
    lengths = (NUM_TOKENS, NUM_TOKENS - 12)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def plain_logits(module: Any, prompts: list[list[int]]) -> list[Tensor]:
    """Run each prompt alone through a Hugging Face model with eager attention and without a cache.

    Leaves the model set to eager attention.
    """
    module.set_attn_implementation("eager")
    with torch.inference_mode():
        return [
            module(input_ids=torch.tensor([p]), use_cache=False).logits[0].float() for p in prompts
        ]


def paged_logits(network: Network, layout: Layout, prompts: list[list[int]]) -> list[Tensor]:
    """Run the prompts side by side on a pool of their own, in chunks and token by token."""
    per_prompt = -(-NUM_TOKENS // BLOCK_SIZE)
    pool = SharedPool.private(layout, per_prompt * len(prompts) + 1, BLOCK_SIZE)
    # Blocks of the two sequences alternate, back to front: nothing lies in order.
    count = len(prompts)
    tables = [
        [1 + count * (per_prompt - 1 - i) + j for i in range(per_prompt)] for j in range(count)
    ]
    got: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * count
    for cut in (21, 30, 31, NUM_TOKENS):
        pieces, who = [], []
        for i, prompt in enumerate(prompts):
            end = min(cut, len(prompt))
            if end > done[i]:
                pieces.append(Piece(prompt[done[i] : end], done[i], tables[i]))
                who.append((i, end - done[i]))
                done[i] = end
        logits = network(Batch.pack(pieces, BLOCK_SIZE, all_rows=True), pool, None)
        parts = torch.split(logits, [n for _, n in who])
        for (i, _), part in zip(who, parts, strict=True):
            got[i].append(part)
    return [torch.cat(parts) for parts in got]


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """Give the norm of all logits' differences relative to their own; infinite for NaN."""
    a, b = torch.cat(got), torch.cat(want)
    gap = float((a - b).norm() / b.norm().clamp(min=1e-6))
    return gap if math.isfinite(gap) else math.inf
