"""From logits to the next token: the most likely one, or one that is drawn.

```
logits   + bias, - penalties, / temperature, softmax:
shares   . . 2 . | 1 . . 4 | . . . . | 3 . . .    in groups of 256 tokens
sums           2         5           0         3    each runs as fast as its sum: one group wins
                   1 . . 4                          its tokens, as fast as their shares: one wins
                         └── is it kept by top_k, top_p, min_p? else it and all less likely ones
                             are out, and the others run again
```
To run is to need an exponentially distributed time, divided by the share: who is first is first as
often as its share says, and so is the first of the first group.  The times depend on (seed, sample,
position) alone, so logits that differ in their last bits give the same token, but where two arrive
together.  A draw needs some hundred numbers, not one for each token, and nothing is ever sorted.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from math import inf
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_worker.constrain import Constraint
from prefixcache_worker.draws import Place, exponentials
from prefixcache_worker.penalties import Penalties

_GROUP: Final = 256
"""Tokens that run together at first; part of what a seed means, as is the whole race."""

LEAST_REPETITION: Final = 0.01
MOST_REPETITION: Final = 100.0
"""Logits that are multiplied or divided by so much are still numbers in float32."""

_COLDEST: Final = 2.0**-100
"""What logits are divided by, at least; below it float32 knows no other answer than the best."""

_HOTTEST: Final = 2.0**100
"""And at most: above it all tokens are alike, and what is ruled out stays so."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens are chosen.

    >>> Sampling().greedy
    True
    """

    temperature: float = 0.0
    """0 takes the most likely token; 1 samples from the model's own distribution."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability are sampled, of those that
    `top_k` and `min_p` keep."""
    seed: int | None = None
    """The same seed, sample and logits give the same tokens; None: another seed every time."""
    sample: int = 0
    """Which of several answers to one prompt and seed this is: each draws other numbers."""
    top_k: int = 0
    """Only so many of the most likely tokens are sampled; 0: all."""
    min_p: float = 0.0
    """Only tokens are sampled that are at least this part as likely as the most likely one."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the answer has already."""
    frequency_penalty: float = 0.0
    """The same, for each time that it has them."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that prompt or answer have, and multiplies others."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, and what is added to their logits."""
    min_tokens: int = 0
    """Before the answer has as many tokens, nothing ends it."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise InvalidRequest(f"temperature {self.temperature} is not a number from 0 up")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p {self.top_p} is not above 0 and at most 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InvalidRequest(f"seed {self.seed} is not a whole number of 64 bits")
        if not 0 <= self.sample < 2**31:
            raise InvalidRequest(f"sample {self.sample} is not from 0 to {2**31 - 1}")
        if self.top_k < 0:
            raise InvalidRequest(f"top_k {self.top_k} is not a number from 0 up")
        if not 0.0 <= self.min_p <= 1.0:
            raise InvalidRequest(f"min_p {self.min_p} is not from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise InvalidRequest(f"{name} {getattr(self, name)} is not from -2 to 2")
        if not LEAST_REPETITION <= self.repetition_penalty <= MOST_REPETITION:
            raise InvalidRequest(
                f"repetition_penalty {self.repetition_penalty} is not from {LEAST_REPETITION:g} to "
                f"{MOST_REPETITION:g}"
            )
        if not all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias):
            raise InvalidRequest("logit_bias adds from -100 to 100 to a logit")
        if self.min_tokens < 0:
            raise InvalidRequest(f"min_tokens {self.min_tokens} is not a number from 0 up")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether it matters what was said before."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


@dataclass(frozen=True, slots=True)
class TopTwo:
    """The two most likely tokens of a step and their logits, best first."""

    tokens: tuple[int, int]
    logits: tuple[float, float]


class Sampler:
    """How the tokens of one request are chosen.  It remembers what was said, and no more.

    Args:
        sampling: how.
        prompt: what the answer follows.
        stop_ids: the tokens that end it.
        constraint: what it is held to, if anything.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Iterable[int] = (),
        stop_ids: Iterable[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self.sampling = sampling
        self.constraint = constraint
        self._penalties = (
            Penalties(
                prompt,
                sampling.repetition_penalty,
                sampling.presence_penalty,
                sampling.frequency_penalty,
            )
            if sampling.penalised
            else None
        )
        self._biased = torch.tensor([token for token, _ in sampling.logit_bias], dtype=torch.int64)
        self._bias = torch.tensor([bias for _, bias in sampling.logit_bias])
        self._ends = torch.tensor(
            sorted(stop_ids) if sampling.min_tokens else [], dtype=torch.int64
        )
        others = () if constraint is None else constraint.ends.difference(stop_ids)
        self._others = torch.tensor(sorted(others), dtype=torch.int64)
        """Ends of the model's own that do not count here."""
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        """Of its draws: with it, another worker draws the same."""

    def add(self, token: int) -> None:
        """Take the answer's next token."""
        if self._penalties is not None:
            self._penalties.add(token)
        if self.constraint is not None:
            self.constraint.add(token)

    def adjusts(self, position: int) -> bool:
        """Tell whether the logits of this position are changed before a token is chosen."""
        early = len(self._ends) > 0 and position < self.sampling.min_tokens
        changes = early or len(self._bias) > 0 or self._penalties is not None
        return changes or self.constraint is not None

    def adjust(self, logits: Tensor, position: int) -> None:
        """Add the bias, take off the penalties, and rule out what may not come, in place.

        That is an end that is too early, and whatever the constraint does not allow.
        """
        logits.index_add_(0, self._biased, self._bias)
        early = position < self.sampling.min_tokens
        if early and self.constraint is None:
            logits[self._ends] = -inf
        if self._penalties is not None:
            self._penalties.apply(logits)
        if self.constraint is not None:
            not_yet = torch.cat([self._ends, self._others]) if early else self._others
            self.constraint.apply(logits, not_yet)

    def whole(self, shares: Tensor) -> float:
        """Give the probability of what `top_k` and `min_p` keep, of which `top_p` is a part."""
        how = self.sampling
        if how.top_p == 1.0 or not (how.top_k or how.min_p):
            return 1.0
        values = shares.topk(min(how.top_k, len(shares))).values if how.top_k else shares
        kept = values[values >= how.min_p * shares.max()]
        return float(kept.sum(dtype=torch.float64))

    def keeps(self, shares: npt.NDArray[np.float32], token: int, whole: float) -> bool:
        """Tell whether a token may be drawn, by those that are likelier.  O(vocabulary).

        Of tokens with the same share the lower id counts as likelier.  The likeliest one always
        may.

        Args:
            shares: of all tokens, or at least of those that are likelier.
            token: that was drawn.
            whole: what `top_p` is a part of.
        """
        how = self.sampling
        share = shares[token]
        if how.min_p and share < how.min_p * shares.max():
            return False
        if how.top_p == 1.0 and not how.top_k:
            return True
        tokens = np.flatnonzero(shares >= share)
        likely = shares[tokens]
        before = likely[(likely > share) | (tokens < token)]
        if not len(before):  # even if what it is compared with is too small for a number
            return True
        if how.top_k and len(before) >= how.top_k:
            return False
        return how.top_p == 1.0 or bool(before.sum(dtype=np.float64) < how.top_p * whole)


def choose(samplers: Sequence[Sampler], logits: Tensor, positions: Sequence[int]) -> list[int]:
    """Choose the tokens of a step.  O(rows * vocabulary).

    Args:
        samplers: of each row.
        logits: float32 `[rows, vocab]`, each row with a number in it and no NaN; not changed.
        positions: how many tokens each answer has so far.
    """
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.sampling.greedy]
    if drawn and len(drawn) == len(samplers):
        return _draw(samplers, logits, positions)
    chosen: list[int] = logits.argmax(-1).tolist() if samplers else []
    for row, (sampler, position) in enumerate(zip(samplers, positions, strict=True)):
        if sampler.sampling.greedy and sampler.adjusts(position):
            adjusted = logits[row].clone()
            sampler.adjust(adjusted, position)
            chosen[row] = int(adjusted.argmax())
    if drawn:
        there = [samplers[row] for row in drawn]
        tokens = _draw(there, logits[drawn], [positions[row] for row in drawn])
        for row, token in zip(drawn, tokens, strict=True):
            chosen[row] = token
    return chosen


def _draw(samplers: Sequence[Sampler], logits: Tensor, positions: Sequence[int]) -> list[int]:
    """Draw a token for each row, as often as its share of what is kept says."""
    width = logits.shape[1]
    shares = torch.empty(len(samplers), -(-width // _GROUP) * _GROUP)
    for row, one, sampler, position in zip(shares, logits, samplers, positions, strict=True):
        # All of one row before the next one: it stays in the cache.
        if sampler.adjusts(position):
            sampler.adjust(row[:width].copy_(one), position)
            one = row[:width]
        divisor = min(max(sampler.sampling.temperature, _COLDEST), _HOTTEST)
        torch.div(one, divisor, out=row[:width])
        row[width:] = -inf
        torch.softmax(row, -1, out=row)
    wholes = [sampler.whole(row) for sampler, row in zip(samplers, shares, strict=True)]
    places = [
        Place(sampler.seed, sampler.sampling.sample, position)
        for sampler, position in zip(samplers, positions, strict=True)
    ]
    tokens = [0] * len(samplers)
    rows = list(range(len(samplers)))
    for attempt in count():
        raced = shares if len(rows) == len(shares) else shares[rows]
        again = []
        winners = _race(raced, [places[row] for row in rows], attempt)
        for row, token in zip(rows, winners, strict=True):
            tokens[row] = token
            values = shares[row].numpy()
            if not samplers[row].keeps(values, token, wholes[row]):
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


@dataclass(frozen=True, slots=True)
class Logprobs:
    """How likely the model itself found a token: before temperature, bias and penalties."""

    logprob: float
    """Natural logarithm of the probability of the chosen token."""
    top: tuple[tuple[int, float], ...]
    """The most likely tokens and theirs, best first; the chosen one need not be among them."""


def logprobs(logits: Tensor, token: int, num_top: int) -> Logprobs:
    """Give the log-probability of a token, and those of the `num_top` most likely ones.

    Args:
        logits: float32 `[vocab]`, as the model gave them.
        token: the chosen one.
        num_top: from 0 on; those that are impossible are left out.
    """
    total = float(logits.logsumexp(-1))
    values, tokens = logits.topk(min(num_top, len(logits)))
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    top = tuple((one, value - total) for one, value in pairs if value > -inf)
    return Logprobs(float(logits[token]) - total, top)


def top_two(logits: Tensor) -> TopTwo:
    """Give the two most likely tokens of logits `[vocab]`."""
    values, tokens = logits.topk(2)
    first, second = tokens.tolist()
    best, other = values.tolist()
    return TopTwo((first, second), (best, other))
