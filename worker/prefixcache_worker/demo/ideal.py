"""What perfect sharing would compute, and what separate caches would hold, from the tokens alone.

Nothing here knows the cache: it compares sequences as strings of bytes, two by two, so that the
demo's figures are checked by something that cannot share the cache's mistakes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prefixcache.types import TOKEN_BYTES, pack


@dataclass(frozen=True, slots=True)
class Sequenced:
    """One request as tokens: the prompt that was sent, and the answer that came."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def stored(self) -> bytes:
        """Packed tokens whose keys and values exist in the end.

        The last token of an answer is never fed to the model, so that it has none.
        """
        return pack([*self.prompt, *self.answer[:-1]])


def common_prefix(a: bytes, b: bytes) -> int:
    """Give the number of whole tokens with which both begin.  O(n log n) comparisons of memory.

    >>> common_prefix(pack([1, 2, 3]), pack([1, 2, 4, 5]))
    2
    """
    low, high = 0, min(len(a), len(b)) // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if a[: middle * TOKEN_BYTES] == b[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


def ideal_tokens(requests: Sequence[Sequenced]) -> int:
    """Count the prompt tokens that even perfect sharing has to compute.  O(requests² n log n).

    A token need not be computed if an earlier request (in the order of `requests`) left it behind
    the very same tokens; at least one token of every prompt is computed, for its logits.

    >>> first, second = Sequenced((1, 2, 3), (8, 9)), Sequenced((1, 2, 3, 8, 9, 4), (5,))
    >>> ideal_tokens([first, second])  # the 3 of the first; 9 (never fed) and 4 of the second
    5
    """
    stored: list[bytes] = []
    total = 0
    for request in requests:
        prompt = pack(request.prompt)
        known = max((common_prefix(prompt, other) for other in stored), default=0)
        total += max(1, len(request.prompt) - known)
        stored.append(request.stored)
    return total


def num_blocks(requests: Iterable[Sequenced], block_size: int) -> int:
    """Count the blocks that one cache holds after `requests`, each shared prefix once.

    Sorted, the sequence that shares most with another stands next to it; whole blocks of that
    common prefix are held once, and a last block that the next one continues is not held twice.

    >>> one, two = Sequenced((1, 2, 3, 4, 5), ()), Sequenced((1, 2, 3, 4, 6, 7), ())
    >>> num_blocks([one, two], block_size=4)
    3
    """
    total, before = 0, b""
    for sequence in sorted(request.stored for request in requests):
        shared = common_prefix(before, sequence)
        length, length_before = len(sequence) // TOKEN_BYTES, len(before) // TOKEN_BYTES
        total += -(-length // block_size) - shared // block_size
        if shared == length_before and shared % block_size:
            total -= 1  # the partly filled last block of the one before is continued, not repeated
        before = sequence
    return total
