"""Waiting until something holds, in a benchmark that has started what brings it about."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_PATIENCE_S: Final = 60.0


def until(holds: Callable[[], object]) -> None:
    """Return once it holds; it is asked every two milliseconds.

    Raises:
        SystemExit: it has not come about in a minute.
    """
    end = time.monotonic() + _PATIENCE_S
    while not holds():
        if time.monotonic() > end:
            raise SystemExit(f"what was waited for has not come about in {_PATIENCE_S:g} s")
        time.sleep(0.002)
