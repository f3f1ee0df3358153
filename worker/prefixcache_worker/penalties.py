"""What a request has said so far, and what its next tokens pay for that.

```
prompt       5 9 9        tokens   5  9  7  3      each once, in the order in which they came
answer       9 7 7 3      counts   0  1  2  1      of the answer
```
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import torch
from torch import Tensor

_FIRST: Final = 64
"""Places for tokens of an answer, until there are more."""


class Penalties:
    """Makes tokens less likely that were said already.  O(different tokens) a step.

    Args:
        prompt: tokens that count as said for `repetition`.
        repetition: positive logits are divided by it, others multiplied; 1 changes nothing.
        presence: taken off the logit of each token of the answer, once.
        frequency: the same, for each time that it is there.
    """

    def __init__(
        self, prompt: Iterable[int], repetition: float, presence: float, frequency: float
    ) -> None:
        self._repetition = repetition
        self._presence = presence
        self._frequency = frequency
        different = list(dict.fromkeys(prompt)) if repetition != 1.0 else []
        self._place = {token: place for place, token in enumerate(different)}
        self._tokens = np.array([*different, *[0] * _FIRST], dtype=np.int64)
        self._counts = np.zeros(len(self._tokens), dtype=np.float32)

    def add(self, token: int) -> None:
        """Take the answer's next token.  O(1)."""
        place = self._find(token)  # first: it may put a longer array in the place of this one
        self._counts[place] += 1

    def apply(self, logits: Tensor) -> None:
        """Change logits `[vocab]` in their place."""
        num = len(self._place)
        tokens = torch.from_numpy(self._tokens[:num])
        counts = torch.from_numpy(self._counts[:num])
        said = logits[tokens]
        if self._repetition != 1.0:
            said = torch.where(said > 0, said / self._repetition, said * self._repetition)
        logits[tokens] = said - self._frequency * counts - self._presence * (counts > 0)

    def _find(self, token: int) -> int:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        return place
