"""Random numbers that depend on nothing but where they are drawn: on seed, sample and position.

```
            key                     counter                          numbers
Philox  (seed, sample)   (0 1 2 ..., 0, attempt, position)   ──►   two in each 64 bits
```
There is no generator whose state would have to be handed on: whoever knows a request's seed and how
many tokens its answer has, draws the next one as anybody else would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

_WORD: Final = 2**64


class Place(NamedTuple):
    """Where numbers are drawn."""

    seed: int
    """Of the request; any whole number of 64 bits."""
    sample: int
    """Which of the answers to it, from 0 on."""
    position: int
    """Of the token in the answer, from 0 on."""


def exponentials(places: Sequence[Place], count: int, *, attempt: int = 0) -> Tensor:
    """Draw exponentially distributed numbers, float32 `[places, count]`, above 0.

    The first ones of a place are the same whatever `count` and the other places are.

    Args:
        places: where.
        count: numbers wanted at each.
        attempt: from 0 on; each draws other numbers.

    >>> one, other = exponentials([Place(7, 0, 3), Place(7, 0, 4)], 9)
    >>> bool((exponentials([Place(7, 0, 4)], 5)[0] == other[:5]).all())
    True
    """
    words = np.empty((len(places), (count + 1) // 2), dtype="<u8")
    for row, (seed, sample, position) in zip(words, places, strict=True):
        philox = np.random.Philox(
            key=np.array([seed % _WORD, sample], dtype=np.uint64),
            counter=np.array([0, 0, attempt, position], dtype=np.uint64),
        )
        row[:] = philox.random_raw(len(row))
    uniform = torch.from_numpy(words.view("<u4")[:, :count].astype(np.float32))
    # From 2^-33 to 1, fine where it is small: there the winner of a race is found.
    return uniform.add_(0.5).mul_(-(2.0**-32)).log1p_().neg_()
