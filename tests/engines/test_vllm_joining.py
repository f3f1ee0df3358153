"""What an engine is told before it takes its first request."""

import pytest

from prefixcache.errors import Unsupported
from prefixcache.types import Layout, PoolHandle
from prefixcache_vllm.joining import check_room

POOL = PoolHandle("shm", "/p", 33, 32, Layout(planes=2, page_bytes=64, format="x"), 1, 0, 1)
"""32 blocks that are lent."""


def test_a_longest_request_that_would_never_have_room_is_refused_with_the_numbers() -> None:
    check_room(POOL, 28 * 32, spare_blocks=4)
    with pytest.raises(Unsupported, match=r"897 needs 29 blocks of 32 tokens.* lends 28 beside 4 "):
        check_room(POOL, 28 * 32 + 1, spare_blocks=4)
