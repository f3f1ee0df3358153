"""From logits to the next token: greedy, or seeded by temperature and nucleus."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest


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
    """The same seed and logits give the same tokens; None: another seed every time."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise InvalidRequest(f"temperature {self.temperature} is not a number from 0 up")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p {self.top_p} is not above 0 and at most 1")

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
    """Chooses the tokens of one request; its random numbers are its own.

    Args:
        sampling: how.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if not sampling.greedy:
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            self._generator.manual_seed(seed)

    def choose(self, logits: Tensor) -> int:
        """Choose a token from float32 logits `[vocab]`.  Draws one random number unless greedy."""
        if self.sampling.greedy:
            return int(logits.argmax())
        shares, tokens = torch.softmax(logits / self.sampling.temperature, -1).sort(
            descending=True, stable=True
        )
        total = shares.cumsum(-1)
        # The nucleus is every token that the ones before it do not fill already.
        kept = max(1, int((total - shares < self.sampling.top_p).sum()))
        drawn = torch.rand((), generator=self._generator) * total[kept - 1]
        index = int(torch.searchsorted(total[:kept], drawn, right=True))
        return int(tokens[min(index, kept - 1)])


def top_two(logits: Tensor) -> TopTwo:
    """Give the two most likely tokens of logits `[vocab]`."""
    values, tokens = logits.topk(2)
    first, second = tokens.tolist()
    best, other = values.tolist()
    return TopTwo((first, second), (best, other))
