"""From logits to the next token: the most likely one, or one that is drawn.

```
shares   . . 2 . | 1 . . 4 | . . . . | 3 . . .    softmax of logits / temperature, in groups of 256
sums           2         5           0         3    each runs as fast as its sum: one group wins
                   1 . . 4                          its tokens, as fast as their shares: one wins
                         └── is it in the nucleus? else it and all less likely ones are out: again
```
To run is to need an exponentially distributed time, divided by the share: who is first is first as
often as its share says, and so is the first of the first group.  The times depend on (seed, sample,
position) alone, so logits that differ in their last bits give the same token, but where two arrive
together.  A draw needs some hundred numbers, not one for each token, and nothing is ever sorted.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import inf
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_worker.draws import Place, exponentials

_GROUP: Final = 256
"""Tokens that run together at first; part of what a seed means, as is the whole race."""

_COLDEST: Final = 2.0**-100
"""What logits are divided by, at least; below it float32 knows no other answer than the best."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens are chosen.

    >>> Sampling().greedy
    True
    """

    temperature: float = 0.0
    """0 takes the most likely token; 1 samples from the model's own distribution."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability are sampled."""
    seed: int | None = None
    """The same seed, sample and logits give the same tokens; None: another seed every time."""
    sample: int = 0
    """Which of several answers to one prompt and seed this is: each draws other numbers."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise InvalidRequest(f"temperature {self.temperature} is not a number from 0 up")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p {self.top_p} is not above 0 and at most 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InvalidRequest(f"seed {self.seed} is not a whole number of 64 bits")
        if not 0 <= self.sample < 2**31:
            raise InvalidRequest(f"sample {self.sample} is not from 0 to {2**31 - 1}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class TopTwo:
    """The two most likely tokens of a step and their logits, best first."""

    tokens: tuple[int, int]
    logits: tuple[float, float]


class Sampler:
    """How the tokens of one request are chosen.  It remembers nothing from one to the next.

    Args:
        sampling: how.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        """Of its draws: with it, another worker draws the same."""

    def keeps(self, shares: npt.NDArray[np.float32], token: int) -> bool:
        """Tell whether a token is in the nucleus: those that are likelier do not fill `top_p`.

        Of tokens with the same share the lower id counts as likelier.  O(vocabulary).
        """
        top_p = self.sampling.top_p
        if top_p == 1.0:
            return True
        tokens = np.flatnonzero(shares >= shares[token])
        likely = shares[tokens]
        before = likely[(likely > shares[token]) | (tokens < token)]
        return bool(before.sum(dtype=np.float64) < top_p)


def choose(samplers: Sequence[Sampler], logits: Tensor, positions: Sequence[int]) -> list[int]:
    """Choose the tokens of a step.  O(rows * vocabulary).

    Args:
        samplers: of each row.
        logits: float32 `[rows, vocab]`; not changed.
        positions: how many tokens each answer has so far.
    """
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.sampling.greedy]
    if not drawn:
        return logits.argmax(-1).tolist()
    chosen = [0] * len(samplers)
    if len(drawn) < len(samplers):
        greedy = [row for row, sampler in enumerate(samplers) if sampler.sampling.greedy]
        for row, token in zip(greedy, logits[greedy].argmax(-1).tolist(), strict=True):
            chosen[row] = token
        logits = logits[drawn]
    for row, token in zip(
        drawn,
        _draw([samplers[row] for row in drawn], logits, [positions[row] for row in drawn]),
        strict=True,
    ):
        chosen[row] = token
    return chosen


def _draw(samplers: Sequence[Sampler], logits: Tensor, positions: Sequence[int]) -> list[int]:
    """Draw a token for each row, as often as its share of what is kept says."""
    width = logits.shape[1]
    shares = torch.empty(len(samplers), -(-width // _GROUP) * _GROUP)
    for row, sampler, one in zip(shares, samplers, logits, strict=True):  # a row stays in the cache
        torch.div(one, max(sampler.sampling.temperature, _COLDEST), out=row[:width])
        row[width:] = -inf
        torch.softmax(row, -1, out=row)
    places = [
        Place(sampler.seed, sampler.sampling.sample, position)
        for sampler, position in zip(samplers, positions, strict=True)
    ]
    tokens = [0] * len(samplers)
    rows = list(range(len(samplers)))
    for attempt in count():
        raced = shares if len(rows) == len(shares) else shares[rows]
        again = []
        for row, token in zip(
            rows, _race(raced, [places[row] for row in rows], attempt), strict=True
        ):
            tokens[row] = token
            values = shares[row].numpy()
            if not samplers[row].keeps(values, token):
                share = values[token]
                values[token:][values[token:] <= share] = 0.0
                values[:token][values[:token] < share] = 0.0
                again.append(row)
        rows = again
        if not rows:
            break
    return tokens


def _race(shares: Tensor, places: Sequence[Place], attempt: int) -> list[int]:
    """Let the tokens of each row run; give who is first."""
    groups = shares.view(len(shares), -1, _GROUP)
    times = exponentials(places, _GROUP + groups.shape[1], attempt=attempt)
    first = (groups.sum(-1) / times[:, _GROUP:]).argmax(-1)
    inside = (groups[torch.arange(len(shares)), first] / times[:, :_GROUP]).argmax(-1)
    return (first * _GROUP + inside).tolist()


def top_two(logits: Tensor) -> TopTwo:
    """Give the two most likely tokens of logits `[vocab]`."""
    values, tokens = logits.topk(2)
    first, second = tokens.tolist()
    best, other = values.tolist()
    return TopTwo((first, second), (best, other))
