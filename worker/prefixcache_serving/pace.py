"""How long a worker's steps take, and how long it may be silent before it must be stuck.

```
event ─── step of n tokens ─── event      took s: one unit is s / weight(n)
event ─── step of m tokens ─── …          may take MANY times the longest unit of late, x weight(m)
```
A step costs something however few tokens it has, so a token more counts as a sixteenth of a step.
Nothing is assumed about a machine: one that is ten times slower is waited for ten times as long.
"""

from __future__ import annotations

from collections import deque
from typing import Final

FEW: Final = 8
"""Steps after which a bound is drawn from them."""
UNKNOWN_S: Final = 20.0
"""How long a worker may be silent of which no steps are known, beside ..."""
UNKNOWN_TOKEN_S: Final = 0.05
"""... so long for each token that it has to compute."""
MANY: Final = 20.0
"""Times the longest step of late, for as many tokens."""
LEAST_S: Final = 3.0
"""In any case: a worker with nothing to compute says so once a second."""
_OF_LATE: Final = 64
_FREE_TOKENS: Final = 16
_SAME_STEP_S: Final = 0.0005
"""Events no further apart are of one step."""


class Pace:
    """The steps of one worker.  O(1), but for `patience_s`, which looks at the last 64.

    >>> pace = Pace()
    >>> pace.patience_s(1)
    20.05
    >>> for _ in range(8):
    ...     pace.take(0.5, 1)
    >>> round(pace.patience_s(1), 3), round(pace.patience_s(256), 3)
    (13.0, 163.0)
    """

    def __init__(self) -> None:
        self._units: deque[float] = deque(maxlen=_OF_LATE)

    def take(self, seconds: float, num_tokens: int) -> None:
        """Note a step of so many tokens."""
        if seconds > _SAME_STEP_S:
            self._units.append(seconds / _weight(num_tokens))

    def patience_s(self, num_tokens: int) -> float:
        """Say how long a step of so many tokens may take before it must be stuck."""
        if len(self._units) < FEW:
            return UNKNOWN_S + UNKNOWN_TOKEN_S * num_tokens
        return LEAST_S + MANY * max(self._units) * _weight(num_tokens)


def _weight(num_tokens: int) -> float:
    return 1.0 + num_tokens / _FREE_TOKENS
