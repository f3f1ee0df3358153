"""Prompts with images: the text before one is shared, and the image by who shows the same one."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import prefixcache
from prefixcache.client import MediaItem, media_keys
from prefixcache.client.media import FIRST_WORD
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import InvalidRequest
from prefixcache.types import Grant, Namespace, WorkerId, pack, unpack

CAT, DOG = (hashlib.sha256(name).digest() for name in (b"cat", b"dog"))
IMAGE = 99
"""The placeholder: the same id for every image."""
MODEL = Namespace("a model that sees")


def shown(*parts: list[int] | tuple[bytes, int]) -> tuple[list[int], list[MediaItem]]:
    """A prompt of texts and images."""
    tokens: list[int] = []
    items = []
    for part in parts:
        if isinstance(part, list):
            tokens += part
        else:
            items.append(MediaItem(len(tokens), part[1], part[0]))
            tokens += [IMAGE] * part[1]
    return tokens, items


def keys(*parts: list[int] | tuple[bytes, int]) -> list[int]:
    tokens, items = shown(*parts)
    return unpack(media_keys(tokens, items)).tolist()


def test_text_stays_what_it_is_and_an_image_becomes_words_that_no_vocabulary_has() -> None:
    key = keys([1, 2, 3], (CAT, 5), [4, 5])
    assert (key[:3], key[8:]) == ([1, 2, 3], [4, 5])
    assert len(set(key[3:8])) == 5
    assert all(FIRST_WORD <= word < 2**32 for word in key[3:8])


def test_the_same_image_has_the_same_words_wherever_it_stands_and_another_has_others() -> None:
    cat = keys([1], (CAT, 6))[1:]
    assert keys([7, 8, 9], (CAT, 6), [3])[3:9] == cat
    assert not set(cat) & set(keys([1], (DOG, 6)))
    assert keys([], (CAT, 6), (DOG, 6), (CAT, 6)) == [*cat, *keys([], (DOG, 6)), *cat]


def test_the_same_image_in_fewer_tokens_or_behind_other_placeholders_is_another() -> None:
    first, *_ = keys([], (CAT, 6))
    assert keys([], (CAT, 5))[0] != first  # seen at another resolution
    (other,) = unpack(media_keys([IMAGE + 1] * 6, [MediaItem(0, 6, CAT)]))[:1]
    assert other != first


def test_the_words_are_the_same_in_every_process_and_version() -> None:
    """Engines of different versions on one pool must agree: a change here is one of the wire."""
    drawn = hashlib.shake_128(bytes([32]) + CAT + pack([IMAGE] * 3)).digest(12)
    assert keys([], (CAT, 3)) == [word | FIRST_WORD for word in unpack(drawn)]


def test_a_prompt_without_media_is_packed_as_ever() -> None:
    for tokens in ([1, 2, 3], np.array([1, 2, 3], np.int32), pack([1, 2, 3]), []):
        assert media_keys(tokens, []) == pack(tokens)


@pytest.mark.parametrize("seed", range(200))
def test_every_prompt_is_what_a_loop_over_its_tokens_makes_of_it(seed: int) -> None:
    rng = random.Random(seed)
    parts: list[Any] = []
    for _ in range(rng.randrange(6)):
        if rng.random() < 0.5:
            parts.append([rng.randrange(2**31) for _ in range(rng.randrange(40))])
        else:
            digest = rng.choice((CAT, DOG, rng.randbytes(rng.randrange(16, 65))))
            parts.append((digest, rng.randrange(1, 30)))
    tokens, items = shown(*parts)
    expected = list(tokens)
    for offset, length, digest in items:
        told = bytes([len(digest)]) + digest + pack(tokens[offset : offset + length])
        drawn = hashlib.shake_128(told).digest(4 * length)
        for at in range(length):
            word = int.from_bytes(drawn[4 * at : 4 * at + 4], "little")
            expected[offset + at] = word % 2**31 + 2**31
    rng.shuffle(items)
    assert unpack(media_keys(tokens, items)).tolist() == expected


class Dear:
    """Counts how often Python is asked for a number of it."""

    def __init__(self) -> None:
        self.asked = 0

    def __iter__(self) -> Iterator[MediaItem]:
        self.asked += 1
        yield MediaItem(2, 2, CAT)


def test_items_may_come_from_anything_and_are_read_once() -> None:
    items = Dear()
    assert media_keys([1] * 5, items) == media_keys([1] * 5, [(np.int64(2), np.int8(2), CAT)])  # type: ignore[list-item]
    assert items.asked == 1


@pytest.mark.parametrize(
    ("items", "told"),
    [
        ([(8, 3, CAT)], r"the item of 3 tokens at token 8 is not within the prompt's 10 tokens"),
        ([(-1, 3, CAT)], "at token -1 is not within"),
        ([(2, 0, CAT)], "the item of 0 tokens"),
        ([(10**5000, 1, CAT)], r"a number of 16,610 bits is not within"),
        ([(0, 10**5000, CAT)], r"the item of a number of 16,610 bits tokens"),
        ([(4, 3, CAT), (2, 3, DOG)], "the item at token 4 overlaps the one that ends at 5"),
        ([(2, 3, CAT), (2, 3, CAT)], "overlaps"),
        ([(2, 3, b"cat")], r"is 3 bytes: it is bytes, 16 to 64 of them"),
        ([(2, 3, bytes(65))], "is 65 bytes"),
        ([(2, 3, "c" * 32)], "of type str"),
        ([(2, 3, None)], "of type NoneType"),
        ([(2.0, 3, CAT)], "the offset of an item is of type float, no integer"),
        ([(2, True, CAT)], "the length of an item is of type bool, no integer"),
        ([(2, 3)], "its offset, length and digest"),
        ([7], "its offset, length and digest"),
        (7, "the items of a prompt are several, not of type int"),
        (None, "not of type NoneType"),
    ],
)
def test_an_item_that_cannot_be_is_refused_by_its_numbers(items: Any, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        media_keys(list(range(10)), items)


def test_a_token_in_the_range_of_the_words_is_refused_by_its_place() -> None:
    forged = keys([1, 2], (CAT, 4))
    for items in ([], [MediaItem(0, 1, CAT)], [MediaItem(2, 4, CAT)]):
        with pytest.raises(InvalidRequest, match=r"token 2 is [\d,]+: ids from 2,147,483,648 on"):
            media_keys(forged, items)
    assert media_keys([2**31 - 1], []) == pack([2**31 - 1])
    with pytest.raises(InvalidRequest, match="7 bytes are not whole tokens"):
        media_keys(bytes(7), [])


# -------------------------------------------------------------------------------- what is shared


def computed(cache: PrefixCache, key: bytes) -> int:
    """Acquire, compute and release; give the tokens that were read."""
    grant = cache.acquire(WorkerId(1), MODEL, key, now=0.0)
    assert isinstance(grant, Grant)
    cache.commit(WorkerId(1), grant.lease, len(key) // 4, now=0.0)
    cache.release(WorkerId(1), grant.lease, now=0.0)
    return grant.num_cached


@pytest.mark.parametrize("size", [1, 4, 16])
def test_the_text_before_an_image_is_shared_and_the_image_where_it_is_the_same(size: int) -> None:
    cache = PrefixCache(512 // size, size)
    cache.attach(WorkerId(1), MODEL, now=0.0)
    text, question = list(range(30)), [5, 6, 7]

    def ask(digest: bytes, *more: int) -> int:
        tokens, items = shown(text, (digest, 20), [*question, *more])
        return computed(cache, media_keys(tokens, items))

    assert ask(CAT) == 0
    assert ask(CAT, 8) == 53
    assert ask(DOG) == 30
    assert ask(DOG, 1) == 53
    # Without keys, the dog would be taken for the cat.
    tokens, _ = shown(text, (CAT, 20), question)
    assert computed(cache, pack(tokens)) == 30
    assert computed(cache, pack(tokens)) == 52
    cache.check()


def test_the_names_are_there_for_who_imports_the_project() -> None:
    assert prefixcache.media_keys is media_keys
    assert prefixcache.MediaItem is MediaItem
