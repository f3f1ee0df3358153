"""Which tokens of a prompt are stored elsewhere, and which of those are computed again.

```
stored   [ a a a a a a | b b b b b b b b b | c c c c c ]
prompt   [ a a a a a a | x x | b b b b b b b b b | y y y ]
           exact         new   moved, delta 2      new
```
A moved key is turned to its new place, and is then what it was behind other tokens: keys and values
of all layers but the first one hold something of what stood before.  So some tokens are computed
again, over what was moved.  Which, is the policy:

| policy | computes again | after |
|---|---|---|
| none | nothing | `--cache-reuse` of llama.cpp |
| first k | the first k tokens of each run: they took themselves for a beginning | EPIC |
| deviation r | the share r whose keys and values at layer 1 are furthest off | CacheBlend |
| all | everything: the answer of a full prefill | |

EPIC is Hu et al., ICML 2025; CacheBlend is Yao et al., EuroSys 2025.  All here is pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest

DEVIATION_LAYER: Final = 1
"""The first layer at which a token's keys and values depend on the tokens before it."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A run of tokens that is stored at another place, or behind other tokens."""

    start: int
    """Position of its first token in the prompt."""
    length: int
    donor: int
    """Which of the stored prompts has it."""
    source: int
    """Position of its first token there."""

    @property
    def delta(self) -> int:
        """How far its keys are turned."""
        return self.start - self.source

    @property
    def positions(self) -> range:
        """Where its tokens are in the prompt."""
        return range(self.start, self.start + self.length)


@dataclass(frozen=True, slots=True)
class Found:
    """What is stored of a prompt."""

    num_exact: int
    """Tokens at its beginning that a stored prompt begins with, too."""
    donor: int
    """Which of the stored prompts that is."""
    moved: tuple[Moved, ...]

    @property
    def positions(self) -> list[int]:
        """Where the moved tokens are in the prompt, in order."""
        return [at for run in self.moved for at in run.positions]


def find(prompt: Sequence[int], stored: Sequence[Sequence[int]], least: int) -> Found:
    """Find what is stored of a prompt, the longest run at each place.  O(all tokens, squared).

    The last token of a prompt is never among what is found: it is computed for its logits.

    Args:
        prompt: token ids.
        stored: at least one.
        least: tokens of the shortest run that is moved.

    >>> found = find([1, 2, 9, 5, 6, 7, 8, 3], [[1, 2, 4, 4, 5, 6, 7, 8]], least=3)
    >>> found.num_exact, found.moved
    (2, (Moved(start=3, length=4, donor=0, source=4),))
    """
    end = len(prompt) - 1
    common = [_num_common(prompt[:end], other) for other in stored]
    donor = max(range(len(stored)), key=common.__getitem__)
    longest = [_runs(np.asarray(prompt), np.asarray(other)) for other in stored]
    moved = []
    at = common[donor]
    while at < end:
        best = max(range(len(stored)), key=lambda which: int(longest[which][0][at]))
        lengths, sources = longest[best]
        length = min(int(lengths[at]), end - at)
        if length >= least:
            moved.append(Moved(at, length, best, int(sources[at])))
            at += length
        else:
            at += 1
    return Found(common[donor], donor, tuple(moved))


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _runs(prompt: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give for each position of a prompt the longest run that begins there, and where it is."""
    lengths, sources = np.zeros(len(prompt), int), np.zeros(len(prompt), int)
    here = np.zeros(len(other) + 1, int)  # of the position after this one, by where in the other
    for at in range(len(prompt) - 1, -1, -1):
        here[:-1] = np.where(other == prompt[at], here[1:] + 1, 0)
        sources[at] = here[:-1].argmax()
        lengths[at] = here[sources[at]]
    return lengths, sources


@dataclass(frozen=True, slots=True)
class Policy:
    """Which moved tokens are computed again; see the table above."""

    kind: Literal["none", "first", "deviation", "all"]
    amount: float = 0.0
    """Of `first`: tokens of each run.  Of `deviation`: a share of all moved tokens."""

    def __post_init__(self) -> None:
        """Refuse an amount that means nothing."""
        is_fitting = {
            "none": self.amount == 0,
            "first": self.amount >= 1 and self.amount == int(self.amount),
            "deviation": 0 < self.amount <= 1,
            "all": self.amount == 0,
        }
        if not is_fitting[self.kind]:
            raise InvalidRequest(f"policy {self.kind!r} with {self.amount:g}")

    def __str__(self) -> str:
        """Name it for people."""
        if self.kind == "first":
            return f"first {self.amount:.0f}"
        return f"deviation {self.amount:.0%}" if self.kind == "deviation" else self.kind

    def again(self, found: Found, deviation: Tensor) -> list[int]:
        """Give the positions of the moved tokens that are computed again, in order.

        Args:
            found: what is stored of the prompt.
            deviation: `[moved tokens]`, how far the stored keys and values of each one are from
                fresh ones; only `deviation` looks.
        """
        moved = found.positions
        if self.kind == "none":
            return []
        if self.kind == "all":
            return moved
        if self.kind == "first":
            return [at for run in found.moved for at in run.positions[: int(self.amount)]]
        count = min(len(moved), round(self.amount * len(moved)))
        return sorted(moved[i] for i in deviation.topk(count).indices.tolist())

    def share(self, num_again: int, num_moved: int, num_layers: int) -> float:
        """Give the share of the moved tokens' work that is done after all.

        To see deviations, all moved tokens go through the layers below `DEVIATION_LAYER`.

        >>> Policy("first", 4).share(5, 20, 30), Policy("deviation", 0.1).share(2, 20, 10)
        (0.25, 0.19)
        """
        if not num_moved:
            return 0.0
        looked_at = DEVIATION_LAYER / num_layers if self.kind == "deviation" else 0.0
        return looked_at + (1 - looked_at) * num_again / num_moved


POLICIES: Final = (
    Policy("none"),
    *(Policy("first", num) for num in (4, 16, 32, 64, 128)),
    *(Policy("deviation", share) for share in (0.05, 0.15, 0.3, 0.5, 0.7, 0.9)),
    Policy("all"),
)
"""What a certificate is about.  CacheBlend computes 15 % again, EPIC up to 32 tokens of a run."""


def deviation(stored: Tensor, fresh: Tensor) -> Tensor:
    """Give how far each token's stored keys and values are from fresh ones, at one layer.

    Args:
        stored: `[2, T, kv_heads, head_dim]`, keys already turned to their places.
        fresh: Likewise, of a full prefill.

    Returns:
        `[T]`: squared distances of keys and of values, each in units of its mean square, added.
    """
    apart = (stored.float() - fresh.float()).pow(2).sum((-1, -2))
    size = fresh.float().pow(2).sum((-1, -2)).mean(-1, keepdim=True)
    return torch.nan_to_num(apart / size).sum(0)
