"""Segments: what keeps them apart from what is exact, and when a request is served without them.

What every verb does to them is in the machine (`rules.py`); how clients see them in
`client/test_segments.py`.
"""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from core.transcript import Transcript
from prefixcache.core import bulk_load, segments
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import InvalidRequest, PoolExhausted, Unsupported
from prefixcache.types import Again, Grant, Ledger, Namespace, Partial, WorkerId, pack

ALICE, BOB = WorkerId(1), WorkerId(2)
CHAT = Namespace("m")
BESIDE = Namespace("m", approximate=True)
DOCUMENT = [*range(100, 116)]
"""Four blocks."""
STORED = [1, 2, 3, 4, *DOCUMENT]
MOVED = [1, 2, 9, *DOCUMENT, 7]


def made(num_blocks: int = 64, **options: Any) -> PrefixCache:
    cache = PrefixCache(num_blocks, 4, ttl_s=10.0, segments_secret=bytes(range(16)), **options)
    for worker in (ALICE, BOB):
        cache.attach(worker, CHAT, now=0.0)
    return cache


def acquire(cache: PrefixCache, tokens: list[int], **terms: Any) -> Grant:
    grant = cache.acquire(ALICE, CHAT, pack(tokens), **({"now": 0.0} | terms))
    assert isinstance(grant, Grant)
    cache.check()
    return grant


def serve(cache: PrefixCache, tokens: list[int], **terms: Any) -> Grant:
    """Acquire, compute and commit everything, release."""
    grant = acquire(cache, tokens, **terms)
    cache.commit(ALICE, grant.lease, len(tokens), now=0.0)
    cache.release(ALICE, grant.lease, now=0.0)
    cache.check()
    return grant


# ------------------------------------------------------------------------------------- the taint


def test_nobody_who_listens_hears_of_what_is_approximate() -> None:
    cache, heard = made(), Transcript(4)
    cache.observe(heard)
    serve(cache, STORED)
    before = dict(heard.prefixes)
    grant = serve(cache, MOVED, segments=Again())
    assert grant.approximate
    assert heard.prefixes == before
    late = Transcript(4)
    for _ in cache.replay(late).run():
        pass
    assert late.prefixes == before
    cache.reset(CHAT)
    assert heard.prefixes == {}


def test_no_other_cache_plays_it_again() -> None:
    cache, log = made(), []
    serve(cache, STORED)
    cache.record(log.append)
    serve(cache, MOVED, segments=Again())
    assert [entry for entry in log if entry[4] is not None] == []


def test_a_restored_index_has_donors() -> None:
    cache = made()
    run = bulk_load.StoredRun(CHAT, -1, pack(STORED), array("i", range(5)))
    cache.restore([run], array("i"), WorkerId(-1))
    cache.attach(ALICE, CHAT, now=0.0)
    (moved,) = acquire(cache, MOVED, segments=Again()).segments
    assert list(moved.blocks) == [1, 2, 3, 4]


def test_another_namespace_gives_nothing() -> None:
    cache = made()
    serve(cache, STORED)
    for space in (Namespace("m", tenant="t"), Namespace("m", salt="s"), Namespace("m", "a")):
        grant = cache.acquire(ALICE, space, pack(MOVED), segments=Again(), attached=False, now=0.0)
        assert isinstance(grant, Grant)
        assert not grant.approximate
        assert grant.ledger == Ledger(cold=20)


def test_what_is_exact_beside_it_is_preferred_unless_a_block_more_is_there() -> None:
    """Three tokens are not worth an answer that may be another."""
    cache = made()
    serve(cache, STORED)
    serve(cache, [*MOVED, 21, 22, 23], segments=Again())
    serve(cache, MOVED)  # computed in full meanwhile
    grant = acquire(cache, [*MOVED, 21, 22, 23, 24], segments=Again())
    assert not grant.approximate
    assert grant.num_cached == 20
    more = acquire(cache, [*STORED, 5], segments=Again())
    assert not more.approximate


# -------------------------------------------------------------------------- without them


def test_without_an_index_they_are_refused() -> None:
    cache = PrefixCache(64, 4)
    cache.attach(ALICE, CHAT, now=0.0)
    with pytest.raises(Unsupported, match="no index of segments is kept here"):
        cache.acquire(ALICE, CHAT, pack(MOVED), segments=Again(), now=0.0)


@pytest.mark.parametrize("again", [Again(-1), Again(share=1.5), Again(share=-0.1), Again(1, 0.5)])
def test_a_policy_that_means_nothing_is_refused(again: Again) -> None:
    cache = made()
    serve(cache, STORED)
    with pytest.raises(InvalidRequest, match="give a number of first tokens, or a share"):
        cache.acquire(ALICE, CHAT, pack(MOVED), segments=again, now=0.0)


def test_where_there_is_no_room_for_copies_it_is_served_exactly() -> None:
    """Five blocks are stored, and none of them may go while it is copied: nine do not hold both."""
    for num_blocks, is_approximate in ((9, False), (10, True)):
        cache = made(num_blocks)
        serve(cache, STORED)
        grant = acquire(cache, MOVED, segments=Again())
        assert grant.approximate is is_approximate
        cache.release(ALICE, grant.lease, now=0.0)
        cache.check()


def test_a_namespace_with_a_quota_is_served_exactly() -> None:
    """What is approximate answers to another account, so that quota could not hold it."""
    cache = made()
    serve(cache, STORED)
    cache.set_quota(CHAT, max_held=20, guaranteed=0, now=0.0)
    assert not acquire(cache, MOVED, segments=Again()).approximate


def test_a_tenant_s_quota_holds_it() -> None:
    cache = made()
    serve(cache, STORED)
    cache.set_quota("", max_held=5, guaranteed=0, now=0.0)
    grant = acquire(cache, MOVED, segments=Again())
    assert grant.approximate
    assert cache.quota("").num_held == 5
    with pytest.raises(PoolExhausted):
        cache.acquire(BOB, CHAT, pack([50]), now=0.0)


def test_of_a_long_prompt_a_part_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MOST_SEARCHED", 12)
    cache = made()
    serve(cache, STORED)
    (moved,) = acquire(cache, MOVED, segments=Again()).segments
    assert len(moved.blocks) == 2  # the third ends 15 tokens behind what is cached


def test_not_many_blocks_are_evicted_at_once_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixcache.core.block_manager.MOST_EVICTED", 4)
    cache = made(20)
    serve(cache, STORED)
    serve(cache, [*range(1000, 1060)])
    assert not acquire(cache, MOVED, segments=Again()).approximate


@pytest.mark.parametrize("partial", list(Partial))
def test_runs_that_are_computed_again_as_a_whole_are_no_segments(partial: Partial) -> None:
    cache = made(partial=partial)
    serve(cache, STORED)
    assert acquire(cache, MOVED, segments=Again(first=15)).ledger.approximate == 1
    assert not acquire(cache, MOVED, segments=Again(first=16)).approximate


# --------------------------------------------------------------------- what is held for it


def test_donors_are_let_go_however_the_lease_ends() -> None:
    for end in ("commit", "release", "expire", "die"):
        cache = made(12)
        serve(cache, [10, 11, 12, 13, *DOCUMENT])
        grant = acquire(cache, [10, 11, 12, 13, 9, *DOCUMENT, 7], segments=Again())
        assert [one.is_exact for one in grant.segments] == [True, False]
        before = cache.snapshot(now=0.0)
        assert before.evictable == 4  # its beginning is protected, the donors are counted as held
        with pytest.raises(PoolExhausted):
            cache.acquire(BOB, CHAT, pack(range(1000, 1028)), now=0.0)
        if end == "commit":
            cache.commit(ALICE, grant.lease, 4, now=0.0)
            cache.release(ALICE, grant.lease, now=0.0)
        elif end == "release":
            cache.release(ALICE, grant.lease, now=0.0)
        elif end == "expire":
            cache.renew(BOB, now=11.0)
            cache.expire(now=11.0)
            cache.worker_gone(ALICE, now=11.0)
        else:
            cache.worker_gone(ALICE, now=0.0)
        cache.check()
        full = cache.acquire(BOB, CHAT, pack(range(1000, 1048)), now=12.0)
        assert isinstance(full, Grant)
        assert len(full.block_table) == 12
        cache.check()


def test_a_document_that_is_there_twice_is_moved_twice() -> None:
    cache = made()
    serve(cache, STORED)
    grant = acquire(cache, [9, *DOCUMENT, 8, *DOCUMENT, 7], segments=Again())
    one, other = grant.segments
    assert (one.start, other.start) == (1, 18)
    assert one.blocks == other.blocks
    cache.release(ALICE, grant.lease, now=0.0)
    cache.check()


def test_explain_says_how_much_of_a_request_was_approximate() -> None:
    cache = made()
    serve(cache, STORED)
    serve(cache, MOVED, segments=Again(), request_id="r")
    told = cache.explain_request("r", lambda space: True, now=1.0)
    assert told.ledger == Ledger(partial=2, cold=2, approximate=16)
    assert [(span.fate, span.end - span.start) for span in told.spans] == [
        ("partial", 2),
        ("approximate", 16),
        ("cold", 2),
    ]
    assert cache.explain(CHAT, pack(MOVED), now=1.0).elsewhere == ()


def test_evicted_tokens_that_are_moved_are_not_counted_as_missed() -> None:
    cache = made(12)
    serve(cache, STORED)
    serve(cache, [5, 6, 9, *DOCUMENT])  # the same document, which stays
    cache.acquire(BOB, CHAT, pack(range(1000, 1012)), now=0.0)
    grant = acquire(cache, [*STORED, 7], segments=Again())
    told = cache.snapshot(now=0.0)
    assert grant.ledger.total == 21
    assert sum(tokens for _, tokens in told.shortage) == told.ledger.evicted
