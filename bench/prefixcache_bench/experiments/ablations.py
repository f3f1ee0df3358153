"""The policy that learns, with one idea taken out or replaced at a time: what each one is worth.

The variants are policies for the time of a measurement only: `registered` adds them to the registry
and takes them out again, so that nobody is offered one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from prefixcache.core.policies import POLICIES
from prefixcache.core.policies.hazard import Floats, Hazard, Hazards

if TYPE_CHECKING:
    from prefixcache.core.node import Match, Node


class WithoutShadow(Hazard):
    """Nobody watches: what was learnt decides even while an LRU would do better."""

    name: ClassVar[str] = "no shadow: never falls back to LRU"

    def asked(self, match: Match, tokens: bytes) -> None:
        """Do not compare."""


class WithoutGrowth(Hazard):
    """New and continued, short and long requests are not told apart."""

    name: ClassVar[str] = "kinds without how the request grew"

    def _growth(self, path: list[Node], size: int) -> int:
        return 0


class WithoutEnds(Hazard):
    """The last block of a path, which a continued chat does not find again, is like all others."""

    name: ClassVar[str] = "kinds without the last block of a path"
    marks_ends: ClassVar[bool] = False


class ShortMemory(Hazard):
    """Only as many ghosts as blocks: whoever was evicted for long is taken for new."""

    name: ClassVar[str] = "ghosts for 1 capacity instead of 20"
    ghosts: ClassVar[float] = 1.0


class MediumMemory(Hazard):
    """Four times as many ghosts as blocks."""

    name: ClassVar[str] = "ghosts for 4 capacities instead of 20"
    ghosts: ClassVar[float] = 4.0


class _Now(Hazards):
    """What is worth most is what is likeliest to return at once."""

    def worth(self, run: float) -> Floats:
        rate: Floats = self.estimate(run) / self._width
        return rate


class _Falling(Hazards):
    """An index that may not rise with age."""

    def worth(self, run: float) -> Floats:
        falling: Floats = np.minimum.accumulate(super().worth(run), axis=1)
        return falling


class _WithIndex(Hazard):
    index: ClassVar[type[Hazards]]

    def __init__(self, num_blocks: int = 1) -> None:
        super().__init__(num_blocks)
        groups, members, _ = self.hazards._shape
        self.hazards = self.index(groups, members, num_blocks)
        self._cells.rank(self.hazards.order(1.0))


class HazardNow(_WithIndex):
    """The hazard itself instead of the Gittins index."""

    name: ClassVar[str] = "the hazard of the moment instead of the index"
    index = _Now


class FallingIndex(_WithIndex):
    """The older, the less worth: as in policies that age."""

    name: ClassVar[str] = "an index that may not rise with age"
    index = _Falling


VARIANTS: tuple[type[Hazard], ...] = (
    WithoutShadow,
    WithoutGrowth,
    WithoutEnds,
    MediumMemory,
    ShortMemory,
    FallingIndex,
    HazardNow,
)


@contextmanager
def registered() -> Iterator[list[str]]:
    """Let the variants be replayed by their names, which are given."""
    POLICIES.update({one.name: one for one in VARIANTS})
    try:
        yield [one.name for one in VARIANTS]
    finally:
        for one in VARIANTS:
            del POLICIES[one.name]
