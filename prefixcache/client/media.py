"""Prompts with images, recordings and files, as a key that says which ones.

```
tokens    7 7 7 ▢ ▢ ▢ ▢ 8 8      ▢ a placeholder: the same id for every image
key       7 7 7 a b c d 8 8      words of the image's digest: other images, other words
          └ shared ┘└ by who shows the same image
```
An engine puts the same id in all places that an item's embeddings will take, so prompts that show
different images look alike.  Keys and values there are the image's: whoever acquired with those
tokens would read another's.  What is acquired is the key, and it is the key that is committed.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from hashlib import shake_128
from operator import attrgetter, index
from typing import Final, NamedTuple, SupportsIndex

from prefixcache.errors import InvalidRequest
from prefixcache.types import TOKEN_BYTES, TokensLike, pack, shown_number, unpack

FIRST_WORD: Final = 2**31
"""Words of media are from here on to `MAX_TOKEN`.  Engines keep token ids in 32 bits with a sign:
no vocabulary reaches them."""

MIN_DIGEST: Final = 16
MAX_DIGEST: Final = 64
"""Bytes of a digest."""

_HIGH: Final = bytes(byte | 0x80 for byte in range(256))
"""Sets the highest bit of a byte, for `bytes.translate`."""


class MediaItem(NamedTuple):
    """One image, recording or file of a prompt.

    Attributes:
        offset: its first token's place in the prompt.
        length: tokens that it takes.
        digest: of 16 to 64 bytes: of its content and of all that decides which embeddings it gets
            (settings of the processor, an adapter of its tower).
    """

    offset: int
    length: int
    digest: bytes


def media_keys(tokens: TokensLike, items: Iterable[MediaItem]) -> bytes:
    """Give the packed tokens of a prompt with words of their digests in the places of its items.

    The words follow from the digest, the length and the tokens that were there, and not from the
    place in the prompt; all other tokens stay.  Nothing is done for each token in Python.

    Two items share their first word once in 2**31, by chance; then one token's keys and values may
    be the other's.  Where people who send media must not be able to look for such pairs, take a
    digest with a key of yours (`hashlib.blake2b(content, key=...)`).

    Args:
        tokens: the prompt, as for `acquire`.
        items: in any order; none may overlap.

    Raises:
        InvalidRequest: an item is not within the prompt, overlaps another, or has no digest; a
            token is no id, or is in the range of the words.

    >>> one, other = (media_keys([7, 0, 0, 8], [MediaItem(1, 2, bytes([n] * 32))]) for n in (1, 2))
    >>> one[:4] == other[:4], one[4:8] == other[4:8], one[12:] == other[12:]
    (True, False, True)
    """
    packed = pack(tokens)
    if len(packed) % TOKEN_BYTES:
        raise InvalidRequest(f"{len(packed):,} bytes are not whole tokens of {TOKEN_BYTES} bytes")
    if not packed[TOKEN_BYTES - 1 :: TOKEN_BYTES].isascii():
        raise _taken(packed)
    if not isinstance(items, Iterable):
        raise InvalidRequest(
            f"the items of a prompt are several, not of type {type(items).__name__}"
        )
    num_tokens, end = len(packed) // TOKEN_BYTES, 0
    checked = sorted((_checked(item, num_tokens) for item in items), key=attrgetter("offset"))
    if not checked:
        return packed
    key = bytearray(packed)
    for item in checked:
        if item.offset < end:
            raise InvalidRequest(
                f"the item at token {item.offset:,} overlaps the one that ends at {end:,}"
            )
        end = item.offset + item.length
        place = slice(item.offset * TOKEN_BYTES, end * TOKEN_BYTES)
        key[place] = _words(item.digest, packed[place])
    return bytes(key)


def _checked(item: MediaItem, num_tokens: int) -> MediaItem:
    try:
        offset, length, digest = item
    except (TypeError, ValueError):
        raise InvalidRequest("an item of a prompt is its offset, length and digest") from None
    offset, length = _whole("offset", offset), _whole("length", length)
    where = f"the item of {shown_number(length)} tokens at token {shown_number(offset)}"
    if offset < 0 or length < 1 or offset + length > num_tokens:
        raise InvalidRequest(f"{where} is not within the prompt's {num_tokens:,} tokens")
    if not isinstance(digest, bytes) or not MIN_DIGEST <= len(digest) <= MAX_DIGEST:
        kind = type(digest).__name__
        told = f"{len(digest):,} bytes" if isinstance(digest, bytes) else f"of type {kind}"
        raise InvalidRequest(
            f"the digest of {where} is {told}: it is bytes, {MIN_DIGEST} to {MAX_DIGEST} of them"
        )
    return MediaItem(offset, length, digest)


def _whole(what: str, number: object) -> int:
    if isinstance(number, SupportsIndex) and not isinstance(number, bool):
        with suppress(TypeError, RuntimeError):  # several numbers, or without memory
            return index(number)
    raise InvalidRequest(f"the {what} of an item is of type {type(number).__name__}, no integer")


def _words(digest: bytes, placeholders: bytes) -> bytearray:
    drawn = shake_128(bytes([len(digest)]) + digest + placeholders).digest(len(placeholders))
    words = bytearray(drawn)
    words[TOKEN_BYTES - 1 :: TOKEN_BYTES] = drawn[TOKEN_BYTES - 1 :: TOKEN_BYTES].translate(_HIGH)
    return words


def _taken(packed: bytes) -> InvalidRequest:
    at, token = next((i, id_) for i, id_ in enumerate(unpack(packed)) if id_ >= FIRST_WORD)
    return InvalidRequest(
        f"token {at:,} is {token:,}: ids from {FIRST_WORD:,} on are words of media, and in no "
        "vocabulary"
    )
