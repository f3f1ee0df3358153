"""What a beam search is told, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Final, Literal

from prefixcache.errors import InvalidRequest

MOST_BEAMS: Final = 64
MOST_LENGTH_PENALTY: Final = 10.0


@dataclass(frozen=True, slots=True)
class BeamSearch:
    """How the likeliest texts are searched."""

    width: int
    """Texts that go on side by side."""
    length_penalty: float = 1.0
    """Above 0 longer texts are preferred, below shorter ones."""
    early_stopping: bool | Literal["never"] = False
    """True: it ends with `width` finished texts; False: also before the last of them could be
    improved, as far as one can tell by the length so far; `never`: by the greatest length."""

    def __post_init__(self) -> None:
        if not 1 <= self.width <= MOST_BEAMS:
            raise InvalidRequest(f"beams is {self.width}; it takes from 1 to {MOST_BEAMS}")
        penalty = self.length_penalty
        if not (isfinite(penalty) and abs(penalty) <= MOST_LENGTH_PENALTY):
            raise InvalidRequest(
                f"length_penalty is {penalty}; it takes from -{MOST_LENGTH_PENALTY:g} to "
                f"{MOST_LENGTH_PENALTY:g}"
            )
        if self.early_stopping not in (True, False, "never"):
            raise InvalidRequest("early_stopping takes true, false or never")


@dataclass(frozen=True, slots=True)
class Beam:
    """A text that was found."""

    tokens: tuple[int, ...]
    text: str
    reason: str
    """`stop` or `length`."""
    score: float
    """Its log-probability, divided by its length to the power of `length_penalty`."""
