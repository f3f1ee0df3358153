"""Figures of vLLM beside vLLM: series of one kind, their ratios, and what was to be reached."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Series:
    """Figures of one kind, in milliseconds or tokens per second, one of each round."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    def shown(self, digits: int = 0) -> str:
        """Give min / median / max.

        >>> Series([3.0, 1.0, 2.0]).shown()
        '1 / 2 / 3'
        """
        low, high = min(self.values), max(self.values)
        return " / ".join(f"{value:,.{digits}f}" for value in (low, self.median, high))


def ratio_of(side: Series, other: Series) -> float:
    """Give the middle one of the ratios of each round.

    >>> ratio_of(Series([1.0, 4.0, 9.0]), Series([1.0, 2.0, 3.0]))
    2.0
    """
    pairs = zip(side.values, other.values, strict=True)
    return statistics.median(mine / its for mine, its in pairs)


def percentile(values: Sequence[float], percent: float) -> float:
    """Give the smallest value that so many percent of them do not exceed.

    >>> percentile([1, 2, 3, 4], 50), percentile([1, 2, 3, 4], 99), percentile([5], 1)
    (2, 4, 5)
    """
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


class Say:
    """Prints a part's tables, and keeps them; tells on standard error how far it is."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.met = 0
        self.missed = 0
        self._began = time.monotonic()

    def __call__(self, line: str = "") -> None:
        """Print a line."""
        print(line, flush=True)
        self.lines.append(line)

    def progress(self, what: str) -> None:
        """Tell what comes now, and after how many minutes; not kept."""
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        print(f"[{minutes:3}:{seconds:02}] {what}", file=sys.stderr, flush=True)

    def goal(self, what: str, ratio: float, goal: float, *, at_least: bool = False) -> None:
        """Say whether a goal is met.

        >>> say = Say()
        >>> say.goal("other's of own", 1.1, 1.15)
        goal met: other's of own 1.100 (at most 1.15)
        >>> say.goal("in place of alone", 0.9, 0.97, at_least=True)
        goal MISSED: in place of alone 0.900 (at least 0.97)
        >>> say.met, say.missed
        (1, 1)
        """
        met = ratio >= goal if at_least else ratio <= goal
        self.met += met
        self.missed += not met
        bound = "at least" if at_least else "at most"
        self(f"goal {'met' if met else 'MISSED'}: {what} {ratio:.3f} ({bound} {goal})")
