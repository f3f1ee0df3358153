"""What an answer may say next, looked up in what it and its prompt have said.

```
tokens   ... 5 8 2 | 7 1 9 4 ... 5 8 2        the last three came before: 7 1 9 4 came then
draft                                | 7 1 9 4
```
A draft is run through the model together with the last token, which costs hardly more, and is taken
as far as it is what would have been chosen anyway: it makes an answer no other, only sooner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

_KEY: Final = 3
"""Tokens that must have come before, the same ones in a row."""


class Drafts:
    """Where each three tokens came last.  O(tokens) memory.

    >>> Drafts([5, 8, 2, 7, 1, 5, 8, 2]).propose([5, 8, 2, 7, 1, 5, 8, 2], 2)
    [7, 1]
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        said = list(tokens)
        keys = zip(*(said[at:] for at in range(_KEY)), strict=False)
        self._after: dict[tuple[int, ...], int] = dict(
            zip(keys, range(_KEY, len(said)), strict=False)
        )
        """Three tokens that another one has followed, and its position."""
        self._last: deque[int] = deque(said, maxlen=_KEY)
        self._num = len(said)

    def add(self, token: int) -> None:
        """Take the next token.  O(1)."""
        if len(self._last) == _KEY:
            self._after[tuple(self._last)] = self._num
        self._last.append(token)
        self._num += 1

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Give `most` tokens that may follow `tokens`, which are all that were added; or none.

        What came after the last three tokens, and, where that ends, the same again.
        """
        at = self._after.get(tuple(self._last))
        if at is None:
            return []
        period = self._num - at
        return [tokens[at + number % period] for number in range(most)]
