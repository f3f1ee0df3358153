"""Progress: what a worker tells of itself with each sign of life, so that a stuck one is seen.

```
reader ──► inbox ──► engine ──► step, step, step …
           │ oldest_s            └ stalled_s since the last one, while requests are in hand
           └ a line that nobody takes
```
Signs of life come from a thread of their own: they say that a process lives, not that it works.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from prefixcache.types import shown

log = logging.getLogger(__name__)

MOST_TOLD = 2**32 - 1
"""Requests that can be told of."""


@dataclass(frozen=True, slots=True)
class Inbox:
    """What was handed to a worker, and it has not taken."""

    num_untaken: int = 0
    oldest_s: float = 0.0
    """How long the oldest of it has lain there."""


@dataclass(frozen=True, slots=True)
class Told:
    """What one sign of life carries."""

    in_hand: int = 0
    stalled_s: float = 0.0
    """Since the last step; 0 with nothing in hand."""
    inbox: Inbox = Inbox()


class Progress:
    """The steps of one worker and its inbox.  From any thread; O(1)."""

    def __init__(self) -> None:
        self._stepped = 0, 0.0
        self._look: Callable[[], Inbox] = Inbox

    def step(self, in_hand: int) -> None:
        """Note a step, and how many requests are in hand after it.

        Raises:
            ValueError: nobody has so many.
        """
        if not _is_count(in_hand) or in_hand > MOST_TOLD:
            raise ValueError(f"{shown(in_hand)} requests in hand; it takes 0 to {MOST_TOLD:,}")
        self._stepped = int(in_hand), time.monotonic()

    def watch(self, look: Callable[[], Inbox]) -> None:
        """Have `look` called for each sign of life.  It must not wait."""
        self._look = look

    def told(self) -> Told:
        """Give what there is to tell now."""
        in_hand, stepped_at = self._stepped
        stalled_s = time.monotonic() - stepped_at if in_hand else 0.0
        return Told(in_hand, stalled_s, self._inbox())

    def _inbox(self) -> Inbox:
        """Ask what lies in the inbox.  The sign of life is sent whatever becomes of that."""
        try:
            inbox = self._look()
            if not _is_count(inbox.num_untaken) or not 0 <= inbox.oldest_s < math.inf:
                raise ValueError(f"{shown(inbox)} is nothing that an inbox can hold")
            return Inbox(int(inbox.num_untaken), float(inbox.oldest_s))
        except Exception:
            log.exception("who tells of a worker's inbox raised: a sign of life tells of none")
            return Inbox()


def _is_count(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 0
