"""Segments, the same against the cache in process and against a real service, by both clients.

64 blocks of 4 tokens; the certificate allows the first 2 tokens of each run, or half of all, to be
computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from certificate_file import write
from client.backends import AsyncBackend, Backend, LocalBackend, RemoteBackend
from patience import PATIENCE_S
from prefixcache.errors import InvalidRequest, PoolExhausted, Unsupported
from prefixcache.types import Again, Ledger, Namespace, pack
from service.service_process import LAYOUT

FIRST = Again(first=2)
DOCUMENT = [*range(100, 116)]
"""Four blocks, behind another beginning each time."""
STORED = pack([1, 2, 3, 4, *DOCUMENT])
MOVED = pack([1, 2, 9, *DOCUMENT, 7])

MADE: dict[str, Callable[[str, str], Backend]] = {
    "in process": lambda target, file: LocalBackend(segments=True),
    "sync client": lambda target, file: RemoteBackend(target, "--segments", file),
    "async client": lambda target, file: AsyncBackend(target, "--segments", file),
}


@pytest.fixture(scope="module", params=list(MADE))
def shared_backend(request: pytest.FixtureRequest, sockets: Path) -> Iterator[Backend]:
    name = request.param.replace(" ", "-")
    backend = MADE[request.param](f"unix:{sockets}/moved-{name}.sock", str(write(sockets)))
    yield backend
    backend.close()


def store(cache: Backend, tokens: bytes = STORED) -> list[int]:
    """Compute and commit a prompt; give its blocks."""
    with cache.attach().acquire(tokens) as lease:
        lease.commit(len(tokens) // 4)
        return list(lease.block_table)


def test_the_same_tokens_are_found_behind_others(cache: Backend) -> None:
    blocks = store(cache)
    lease = cache.attach().acquire(MOVED, segments=FIRST)
    assert lease.approximate
    (moved,) = lease.segments
    assert (moved.start, moved.source, moved.delta, moved.num_again) == (3, 4, -1, 2)
    assert list(moved.blocks) == blocks[1:]
    assert not moved.is_exact
    assert lease.num_cached == 2
    assert lease.copies[0].num_tokens == 2
    assert lease.ledger == Ledger(partial=2, cold=4, approximate=14)
    assert not set(lease.block_table) & set(blocks)


def test_the_exact_beginning_is_copied_along(cache: Backend) -> None:
    blocks = store(cache, pack([*range(10, 18), *DOCUMENT]))
    lease = cache.attach().acquire(pack([*range(10, 18), 9, *DOCUMENT, 7]), segments=FIRST)
    own, moved = lease.segments
    assert own.is_exact
    assert (list(own.blocks), own.num_again) == (blocks[:2], 0)
    assert (moved.start, moved.source) == (9, 8)
    assert (lease.num_cached, lease.ledger.hit, lease.ledger.approximate) == (8, 8, 14)


def test_a_share_is_computed_again_of_all_that_is_moved(cache: Backend) -> None:
    store(cache)
    lease = cache.attach().acquire(MOVED, segments=Again(share=0.5))
    assert lease.segments[0].num_again == 0
    assert lease.ledger == Ledger(partial=2, cold=10, approximate=8)


def test_who_does_not_ask_finds_nothing_of_it(cache: Backend) -> None:
    store(cache)
    session = cache.attach()
    with session.acquire(MOVED, segments=FIRST) as lease:
        lease.commit(20)
    assert session.lookup(MOVED).num_hit == 0
    plain = session.acquire(MOVED)
    assert not plain.approximate
    assert plain.segments == ()
    assert plain.ledger == Ledger(partial=2, cold=18)


def test_the_next_turn_finds_it_beside_what_is_exact(cache: Backend) -> None:
    store(cache)
    session = cache.attach()
    with session.acquire(MOVED, segments=FIRST) as lease:
        lease.commit(20)
        blocks = list(lease.block_table)
    with session.acquire(MOVED + pack([8, 8, 8]), segments=FIRST) as turn:
        assert turn.approximate
        assert turn.segments == ()
        assert list(turn.block_table[:5]) == blocks
        assert (turn.num_cached, turn.ledger) == (20, Ledger(cold=3, approximate=20))


def test_what_is_approximate_is_no_donor(cache: Backend) -> None:
    store(cache)
    session = cache.attach()
    own = [*range(200, 212)]
    with session.acquire(MOVED + pack(own), segments=FIRST) as lease:
        assert lease.approximate
        lease.commit(32)
    other = session.acquire(pack([5, *own, 6]), segments=FIRST)
    assert not other.approximate
    assert other.ledger == Ledger(cold=14)


def test_where_nothing_is_found_elsewhere_it_is_exact(cache: Backend) -> None:
    store(cache)
    session = cache.attach()
    lease = session.acquire(STORED + pack([7]), segments=FIRST)
    assert (lease.approximate, lease.num_cached) == (False, 20)
    lease.commit(21)
    assert session.lookup(STORED + pack([7, 8])).num_partial == 1


def test_donors_stay_until_the_first_commit(cache: Backend) -> None:
    blocks = store(cache)
    session = cache.attach()
    lease = session.acquire(MOVED, segments=FIRST)
    free = cache.snapshot().num_blocks - len(lease.block_table) - len(blocks)
    with pytest.raises(PoolExhausted):
        session.acquire(pack(range(1000, 1000 + 4 * (free + 1))))
    lease.commit(20)
    everything = session.acquire(pack(range(1000, 1000 + 4 * (free + 5))))
    assert set(blocks) <= set(everything.block_table)


def test_a_child_of_it_is_approximate_too(cache: Backend) -> None:
    store(cache)
    session = cache.attach()
    lease = session.acquire(MOVED, segments=FIRST)
    lease.commit(20)
    (child,) = lease.fork(1)
    assert child.approximate
    assert child.ledger == Ledger(approximate=20)


def test_a_repeated_request_says_the_same_again(cache: Backend) -> None:
    store(cache)
    session = cache.attach()
    first = session.acquire(MOVED, segments=FIRST, request_id="r")
    again = session.acquire(MOVED, segments=FIRST, request_id="r")
    assert (again.id, again.segments, again.approximate) == (first.id, first.segments, True)
    with pytest.raises(InvalidRequest, match="way of reuse"):
        session.acquire(MOVED, request_id="r")


def test_who_waits_for_a_prefix_finds_segments_behind_it(cache: Backend) -> None:
    store(cache)
    owner = cache.attach().acquire(pack([30, 31, 32, 33]))
    asked = pack([30, 31, 32, 33, 9, *DOCUMENT, 7])
    waiting = cache.attach().acquire_later(asked, wait_s=PATIENCE_S, segments=FIRST)
    while not cache.snapshot().waiting:  # until PATIENCE_S, as it waits no longer
        cache.pass_time(0.01)
    owner.commit(4)
    lease = waiting.result(PATIENCE_S)
    assert lease.approximate
    assert lease.ledger == Ledger(joined=4, cold=4, approximate=14)


def test_the_snapshot_tells_what_is_approximate(cache: Backend) -> None:
    store(cache)
    session, before = cache.attach(), cache.snapshot().ledger.approximate
    lease = session.acquire(MOVED, segments=FIRST)
    told = cache.snapshot()
    assert told.ledger.approximate == before + 14
    (info,) = told.leases
    assert info.namespace.approximate
    assert "(approximate)" in str(info.namespace)
    assert not any(space.approximate for space in told.namespaces)
    lease.release()


def test_a_reset_forgets_it_too(cache: Backend) -> None:
    store(cache)
    session = cache.attach()
    with session.acquire(MOVED, segments=FIRST) as lease:
        lease.commit(20)
    assert session.reset().num_blocks == 10
    assert not session.acquire(MOVED, segments=FIRST).approximate


def test_reuse_is_not_refused_and_asked_for_at_once(cache: Backend) -> None:
    with pytest.raises(InvalidRequest, match="segments are reused"):
        cache.attach().acquire(MOVED, segments=FIRST, reuse=False)


def test_a_policy_without_a_certificate_is_refused_with_its_number(sockets: Path) -> None:
    file = write(sockets, "refusing")
    remote = RemoteBackend(f"unix:{sockets}/refusing.sock", "--segments", str(file))
    try:
        session = remote.attach()
        assert session.segments == Again(first=2)
        with pytest.raises(Unsupported, match=r"'none': a divergence of 0\.1300 .*0\.01 allowed"):
            session.acquire(MOVED, segments=Again())
        with pytest.raises(Unsupported, match="says nothing of 'first 3'; allowed: first 2, dev"):
            session.acquire(MOVED, segments=Again(first=3))
        with pytest.raises(InvalidRequest, match="segments is True: give an Again"):
            session.acquire(MOVED, segments=True)
        other = remote.attach("another-model")
        assert other.segments is None
        with pytest.raises(Unsupported, match="gives no segments to model 'another-model'"):
            other.acquire(MOVED, segments=FIRST)
        other.segments = FIRST  # as a client that does not look
        with pytest.raises(Unsupported, match="'another-model': no certificate here is of"):
            other.acquire(MOVED, segments=FIRST)
        with pytest.raises(Unsupported, match="not of adapter 'a'"):
            session.acquire(MOVED, segments=FIRST, adapter="a")
        assert session.acquire(MOVED).num_cached == 0
    finally:
        remote.clean()
        remote.close()


def test_nobody_names_what_is_approximate(sockets: Path) -> None:
    """Who could would find there what is not exact, and take it for that."""
    beside = Namespace("model", approximate=True)
    remote = RemoteBackend(f"unix:{sockets}/named.sock", "--segments", str(write(sockets, "named")))
    try:
        store(remote)
        session = remote.attach()
        with session.acquire(MOVED, segments=FIRST) as lease:
            lease.commit(20)
        session._namespace = beside  # a salt of its own is sent with all of it
        with pytest.raises(InvalidRequest, match="an approximate namespace is not named"):
            session.acquire(MOVED, salt="")
        for look in (
            lambda: remote.client.lookup(beside, MOVED),
            lambda: remote.client.explain(beside, MOVED),
            lambda: remote.client.reset(beside),
            lambda: remote.client.pin(beside, MOVED, ttl_s=1.0),
            lambda: remote.client.quota(beside),
        ):
            with pytest.raises(InvalidRequest, match="an approximate namespace is not named"):
                look()
        assert remote.client.lookup(Namespace("model"), MOVED).num_hit == 0
    finally:
        remote.clean()
        remote.close()


def test_a_service_that_gives_none_is_not_asked_for_any(sockets: Path) -> None:
    remote = RemoteBackend(f"unix:{sockets}/plain.sock")
    try:
        session = remote.attach("model")
        assert session.segments is None
        with pytest.raises(Unsupported, match="started without --segments"):
            session.acquire(MOVED, segments=FIRST)
        session.segments = FIRST
        with pytest.raises(Unsupported, match="gives no segments: serve with --segments"):
            session.acquire(MOVED, segments=FIRST)
    finally:
        remote.clean()
        remote.close()


def test_the_layout_is_that_of_the_certificate(sockets: Path) -> None:
    assert LAYOUT.dtype == "float32"
    file = write(sockets, "half", dtype="bfloat16")
    remote = RemoteBackend(f"unix:{sockets}/half.sock", "--segments", str(file))
    try:
        session = remote.attach()
        session.segments = FIRST
        with pytest.raises(Unsupported, match="is of bfloat16, the pool holds float32"):
            session.acquire(MOVED, segments=FIRST)
    finally:
        remote.clean()
        remote.close()
