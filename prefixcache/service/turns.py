"""Turns: what is made in steps takes them one at a time, however much of it is asked for at once.

```
loop    step of a ─ others ─ step of b ─ others ─ step of a ─ others ─ …
```
Each step is short, and in between the loop serves everything else that is ready.  Without turns a
hundred that walk at once would take a hundred steps between two of anybody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any


class Turns:
    """The turns of one trust domain: first come, first served, one step each."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def run(self, steps: Generator[None, None, Any]) -> Any:
        """Run a generator to its value, with the loop's other work between its steps."""
        while True:
            async with self._turn:
                try:
                    next(steps)
                except StopIteration as end:
                    return end.value
                await asyncio.sleep(0)
