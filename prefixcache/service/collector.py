"""The collector: looks for cycles of garbage often, and at little each time.

Python counts objects made less objects let go, and collects when that has grown by a thousand.  In
a cache that is full each new run takes an old one's place, so that count hardly grows, and the
young objects pile up: tens of thousands of them were looked at in one pause of 0.2 s.  So it is
done by the clock here:

```
every 50 ms    the youngest objects, some hundred under load       about 1 ms
every 0.4 s    those that were young since the last time, too      some ms
```
Nodes live long, and nothing of the tree ends in a cycle, so all of it is never walked over: not for
a single request either that makes many objects between two ticks.
"""

from __future__ import annotations

import asyncio
import gc
from typing import Final

TICK_S: Final = 0.05
_TICKS: Final = 8
"""As often as that the objects are looked at again that have been looked at once."""
_AT_ONCE: Final = (50_000, 1_000, 2**31 - 1)
"""Python's own thresholds: for what makes so many objects between two ticks.  The last one counts
how often the second was collected, which is done here all the time."""


async def collect_often() -> None:
    """Collect until cancelled.

    What exists now lives as long as the process: it is never looked at again.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_AT_ONCE)
    tick = 0
    try:
        while True:
            await asyncio.sleep(TICK_S)
            tick += 1
            gc.collect(0 if tick % _TICKS else 1)
    finally:
        gc.set_threshold(*before)
