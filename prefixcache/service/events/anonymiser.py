"""What a recording shows of its tokens and names to who does not have the key: nobody has.

```
id = (high, low), 16 bits each          four times, with a table of its own each time:

 high ───────────► xor ──► low           (high, low) ─► (low, high xor table[low])
                    ▲
 low ──► table ─────┤                    undone from the right, so no two ids meet in one
   └────────────────┼────► high
```
A Feistel network makes a permutation of functions that need not be one; with four rounds of
pseudorandom functions it is a strong pseudorandom permutation: M. Luby and C. Rackoff, *How to
construct pseudorandom permutations from pseudorandom functions*, SIAM J. Comput. 17 (1988).

| survives | is hidden |
|---|---|
| which requests share how long a prefix, at every block size | what an id stood for |
| lengths, times, the order of requests | the text |
| which ids repeat, and how often each occurs | names: model, adapter, tenant, salt |
| which requests share a namespace; which of its fields are empty | |

It does not make a trace safe to publish.  Frequent tokens can be guessed from how often and where
they occur, as in any substitution cipher; who knows what one request said can find it and then
reads its ids everywhere else; and 16-bit halves are small: from very many known ids others follow.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np

from prefixcache.types import Namespace

_ROUNDS = 4
_HALF = 1 << 16
_DIGEST_BYTES = 8


class Anonymiser:
    """A permutation of all 2^32 token ids, and digests of names.  Holds 512 KiB.

    Args:
        key: at least 16 and at most 64 random bytes.  By default fresh ones, which are written
            nowhere: after this object nothing can undo it, and no other makes ids alike.

    >>> from prefixcache.types import pack
    >>> hidden = Anonymiser().tokens(pack([5, 6, 5]))
    >>> hidden[:4] == hidden[8:], hidden[:4] == hidden[4:8], len(hidden)
    (True, False, 12)
    """

    def __init__(self, key: bytes | None = None) -> None:
        key = secrets.token_bytes(32) if key is None else key
        self._key = key
        self._tables = [
            np.frombuffer(hashlib.shake_256(key + bytes([number])).digest(2 * _HALF), "<u2")
            for number in range(_ROUNDS)
        ]

    def tokens(self, tokens: bytes) -> bytes:
        """Replace each packed id by its own, always the same.  O(n), about 10 ns a token."""
        halves = np.frombuffer(tokens, "<u2").reshape(-1, 2)
        low, high = halves[:, 0], halves[:, 1]
        for table in self._tables:
            low, high = high ^ table[low], low
        return np.stack((low, high), axis=1).tobytes()

    def namespace(self, namespace: Namespace) -> Namespace:
        """Replace each field that is not empty by a keyed digest; equal ones stay equal."""
        return Namespace(
            self._digest("model", namespace.model),
            self._digest("adapter", namespace.adapter),
            self._digest("tenant", namespace.tenant),
            self._digest("salt", namespace.salt),
        )

    def _digest(self, field: str, text: str) -> str:
        if not text:
            return ""
        made = hashlib.blake2b(
            text.encode(), key=self._key, person=field.encode(), digest_size=_DIGEST_BYTES
        )
        return made.hexdigest()
