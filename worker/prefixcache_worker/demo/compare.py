"""Are the answers of the shared run those of a model without any cache?  To the bit, or the token.

Every turn of the unshared run is given the very prompt that the shared run had, so that each answer
is compared on its own.  Where workers compute alike in any company (`worker --invariant`), the two
best logits of each step must have the same bits in both runs, and nothing is excused.

Else tokens are compared.  Both runs are fp32 and greedy.  Greedy decoding picks the larger of two
logits; sums of floats depend on how a batch was cut, so that two logits which are equal but for
rounding may be picked either way.  That is the only excuse there is:

```
shared     A B C D E F      same prompt, same first 3 tokens: both runs computed the same
unshared   A B C X Y Z      distribution for the 4th.  In the unshared run X has the best logit and
                 │          D must have the second, no more than 1e-3 below: a numerical tie.
replay     A B C D E F      What follows X says nothing about D E F, so the prompt with A B C D is
                            given to the unshared run again, and the rest compared.
```
Anything else is a wrong answer, and the demo fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from prefixcache_worker.demo.record import TopTwo

TIE: Final = 1e-3
"""Two logits of the unshared run that lie no further apart are a numerical tie."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where an answer of the shared run differs from the unshared one."""

    request: str
    position: int
    """Index of the token in the answer."""
    shared_token: int | None
    """None if the answer ended here."""
    unshared_token: int | None
    shared_logit: float | None
    """The unshared run's logit of `shared_token`; None if it was not among the best."""
    unshared_logit: float | None
    tie: bool
    only_bits: bool = False
    """Whether both runs say the same token, and the logits have other bits."""

    def __str__(self) -> str:
        if self.only_bits:
            return (
                f"{self.request}, answer token {self.position}: {self.shared_token} in both runs, "
                f"but NOT the bits of a model without a cache: its logit is {self.shared_logit!r}, "
                f"not {self.unshared_logit!r}, or that of the second best differs"
            )
        return (
            f"{self.request}, answer token {self.position}: shared {self.shared_token} "
            f"(unshared logit {_number(self.shared_logit)}), unshared {self.unshared_token} "
            f"(logit {_number(self.unshared_logit)}): "
            + ("a numerical tie" if self.tie else "NOT the answer of a model without a cache")
        )


def first_difference(
    request: str,
    shared: Sequence[int],
    unshared: Sequence[int],
    logits: Sequence[TopTwo],
    *,
    start: int = 0,
    tie: float = TIE,
    bits: Sequence[TopTwo] | None = None,
) -> Difference | None:
    """Find the first token at which two answers to the same prompt differ; None if they are equal.

    Args:
        request: the request's name, for the report.
        shared: the answer of the shared run, from token `start` on.
        unshared: the answer of the unshared run to the prompt and the `start` tokens.
        logits: the unshared run's best tokens at each of its steps.
        start: tokens of the answer that are part of the prompt of this comparison.
        tie: logits no further apart are a numerical tie.
        bits: the shared run's two best tokens at each step, to be the same to the bit; None: tokens
            are compared, numerical ties aside.
    """
    for i in range(max(len(shared), len(unshared))):
        ours = shared[i] if i < len(shared) else None
        theirs = unshared[i] if i < len(unshared) else None
        if ours != theirs:
            top = logits[i] if i < len(logits) else None
            most = tie if bits is None else -1.0
            return _judge(request, start + i, ours, theirs, top, most)
        if bits is not None and (i >= len(bits) or i >= len(logits) or bits[i] != logits[i]):
            mine, other = (one[i].best_logit if i < len(one) else None for one in (bits, logits))
            return Difference(
                request, start + i, ours, theirs, mine, other, tie=False, only_bits=True
            )
    return None


def _judge(
    request: str,
    position: int,
    ours: int | None,
    theirs: int | None,
    top: TopTwo | None,
    most: float,
) -> Difference:
    if top is None or ours is None or theirs != top.best:
        return Difference(request, position, ours, theirs, None, None, tie=False)
    logit = top.logit(ours)
    tie = logit is not None and top.best_logit - logit <= most
    return Difference(request, position, ours, theirs, logit, top.best_logit, tie)


def _number(logit: float | None) -> str:
    return "not among the best" if logit is None else f"{logit:.6f}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of all comparisons."""

    num_compared: int
    """Answers that were compared."""
    num_tokens: int
    """Answer tokens that were compared."""
    differences: tuple[Difference, ...]
    of_bits: bool = False
    """Whether logits were compared bit for bit, and not tokens alone."""

    @property
    def identical(self) -> bool:
        """True if every answer is that of a model without a cache, numerical ties aside."""
        return self.num_compared > 0 and all(difference.tie for difference in self.differences)

    @property
    def numerical_ties(self) -> int:
        """Number of places where two logits were equal but for rounding."""
        return sum(difference.tie for difference in self.differences)
