"""What has gone leaves nothing: no name anywhere, no list that grows, and no work for a collector.

A service runs for months, and its garbage collector hardly ever: whatever a request, a lease or a
namespace leaves behind must go with it, at once, or be bounded by a number.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixcache.core import lease
from prefixcache.core.cache import PrefixCache
from prefixcache.core.policies import POLICIES
from prefixcache.core.policies.priority import MAX_RANKS, NORMAL
from prefixcache.errors import CacheError, InvalidRequest
from prefixcache.types import Grant, LeaseId, Namespace, Waiting, WorkerId, pack

ME, OTHER = WorkerId(1), WorkerId(2)
SPACE = Namespace("m")


def reachable(start: object) -> Iterator[object]:
    """Give every object that `start` keeps alive, each once; no code."""
    seen: set[int] = set()
    stack = [start]
    while stack:
        one = stack.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(one))
        yield one
        stack.extend(gc.get_referents(one))


def size(cache: PrefixCache) -> int:
    """Count the objects that a cache keeps alive."""
    return sum(1 for _ in reachable(cache))


def salts(cache: PrefixCache) -> set[str]:
    """Give the salts that anything in a cache still names."""
    return {one.salt for one in reachable(cache) if isinstance(one, Namespace) and one.salt}


@contextmanager
def no_collector() -> Iterator[list[object]]:
    """Do without the garbage collector; give what it would have had to find, once it is over."""
    found: list[object] = []
    gc.collect()
    gc.freeze()  # so that only what is new is looked at, now and the next time
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += [one for one in gc.garbage if type(one).__module__.startswith("prefixcache")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def ask(cache: PrefixCache, space: Namespace, tokens: range, now: float = 0.0) -> LeaseId:
    """Store a prompt; the lease is out."""
    cache.attach(ME, space, now=now)
    grant = cache.acquire(ME, space, pack(tokens), now=now)
    assert isinstance(grant, Grant)
    cache.commit(ME, grant.lease, len(tokens), now=now)
    return grant.lease


def use_once(cache: PrefixCache, number: int) -> None:
    """Ask once behind a salt of its own, and quit it."""
    space = Namespace("m", salt=f"salt {number}")
    lease = ask(cache, space, range(number, number + 3))
    cache.release(ME, lease, now=0.0)
    cache.quit(ME, space)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_salt_that_is_used_once_waits_for_no_collector(policy: str) -> None:
    cache = PrefixCache(16, 2, policy=policy, max_namespaces=12)
    with no_collector() as garbage:
        for number in range(300):
            use_once(cache, number)
            if number % 7 == 0:
                cache.reset(Namespace("m", salt=f"salt {number - 3}"))
    assert not garbage
    assert len(cache.namespaces()) <= 12


WHAT = (
    *("ask", "ask", "release", "quit", "truncate", "fork", "reset", "pin", "unpin", "quota"),
    *("no quota", "wait", "cancel", "expire", "detach", "worker gone"),
)
STEP = st.tuples(st.sampled_from(WHAT), st.integers(0, 5), st.integers(0, 5))


@settings(max_examples=40)
@given(st.sampled_from(sorted(POLICIES)), st.lists(STEP, max_size=60))
def test_after_anything_nothing_names_what_is_gone(
    policy: str, steps: list[tuple[str, int, int]]
) -> None:
    """Whatever was done: once nobody uses it or speaks for it, no structure knows a salt."""
    cache = PrefixCache(12, 2, policy=policy, num_ghosts=0, history_bytes=0, ttl_s=10.0)
    spaces = [Namespace("m", tenant=f"t{n % 2}", salt=f"salt {n}") for n in range(6)]
    held: list[LeaseId] = []
    tickets: list[Waiting] = []
    with no_collector() as garbage:
        for number, (what, which, more) in enumerate(steps):
            now, space = number / 2, spaces[which]
            with suppress(CacheError):
                if what == "ask":
                    held.append(ask(cache, space, range(which, which + more + 1), now))
                elif what == "wait":
                    got = cache.acquire(ME, space, pack(range(9)), wait_s=3.0, now=now)
                    tickets += [got] if isinstance(got, Waiting) else []
                    held += [got.lease] if isinstance(got, Grant) else []
                elif what == "cancel" and tickets:
                    cache.cancel(ME, tickets.pop().ticket, now=now)
                elif what in ("release", "truncate", "fork") and held:
                    lease = held[which % len(held)]
                    if what == "release":
                        cache.release(ME, lease, now=now)
                    elif what == "truncate":
                        cache.truncate(ME, lease, more, now=now)
                    else:
                        held += [one.lease for one in cache.fork(ME, lease, 2, now=now)]
                elif what == "quit":
                    cache.quit(ME, space)
                elif what == "reset":
                    cache.reset(space)
                elif what == "pin":
                    cache.pin(space, pack(range(which, which + more + 1)), ttl_s=5.0, now=now)
                elif what == "unpin":
                    cache.unpin(space)
                elif what.endswith("quota"):
                    limit = None if what.startswith("no") else 4
                    guaranteed = 0 if limit is None else more % 3
                    cache.set_quota(space, max_held=limit, guaranteed=guaranteed, now=now)
                elif what == "expire":
                    cache.expire(now=now)
                elif what == "detach":
                    cache.detach(ME, now=now, gone=more > 2)
                elif what == "worker gone":
                    cache.worker_gone(ME, now=now)
            cache.take_outcomes()
        cache.worker_gone(ME, now=100.0)
        for space in spaces:
            cache.set_quota(space, max_held=None, guaranteed=0, now=100.0)
        cache.expire(now=1000.0)
        cache.take_outcomes()
        # Others come, and need all the room: what is only cached goes, then what is empty.
        for number in range(40):
            late = Namespace("m", salt=f"late {number}")
            cache.release(ME, ask(cache, late, range(24), 1000.0), now=1000.0)
            cache.quit(ME, late)
            cache.reset(late)
        cache.check()
    assert {salt for salt in salts(cache) if not salt.startswith("late")} == set()
    assert not garbage


def ask_the_same(cache: PrefixCache, number: int) -> None:
    """Ask for the same two prompts again and again, while others lie there untouched."""
    at = 100 * number if number < 8 else number % 2
    cache.release(ME, ask(cache, SPACE, range(at, at + 5), number / 1e4), now=number / 1e4)


def use_whole_blocks(cache: PrefixCache, number: int) -> None:
    """Use the same two leaves again and again, to their end, while others lie there untouched."""
    at, now = 100 * number if number < 8 else number % 2, number / 1e4
    cache.attach(ME, SPACE, now=now)
    grant = cache.acquire(ME, SPACE, pack(range(at, at + 5)), now=now)
    assert isinstance(grant, Grant)
    cache.commit(ME, grant.lease, 4, now=now)
    cache.release(ME, grant.lease, now=now)


def copy_a_part(cache: PrefixCache, number: int) -> None:
    """Copy from the same two blocks again and again, and go another way."""
    if number < 8:
        use_whole_blocks(cache, number)
        return
    cache.attach(ME, SPACE, now=number / 1e4)
    grant = cache.acquire(ME, SPACE, pack([100 * (number % 2), 10**6]), now=number / 1e4)
    assert isinstance(grant, Grant)
    assert grant.num_cached == 1
    cache.release(ME, grant.lease, now=number / 1e4)


def give_up_waiting(cache: PrefixCache, number: int) -> None:
    """Wait for what another computes, and give up, while somebody else waits on."""
    cache.attach(ME, SPACE, now=0.0)
    cache.attach(OTHER, SPACE, now=0.0)
    if number == 0:
        assert isinstance(cache.acquire(OTHER, SPACE, pack(range(9)), now=0.0), Grant)
        waits = cache.acquire(ME, SPACE, pack(range(9)), wait_s=1e6, now=0.0)
        assert isinstance(waits, Waiting)
    waits = cache.acquire(ME, SPACE, pack(range(9)), wait_s=1e9, now=0.0)
    assert isinstance(waits, Waiting)
    cache.cancel(ME, waits.ticket, now=0.0)
    cache.next_deadline()


def go_back_and_forth(cache: PrefixCache, number: int) -> None:
    """Store, roll back and store again, in a namespace that was reset meanwhile."""
    if number == 0:
        ask(cache, SPACE, range(12))
        cache.reset(SPACE)
    lease = LeaseId(1)
    cache.truncate(ME, lease, 4, now=0.0)
    cache.extend(ME, lease, 12, now=0.0)
    cache.commit(ME, lease, 12, pack(range(4, 12)), now=0.0)


def reset_each_time(cache: PrefixCache, number: int) -> None:
    """Fill the pool, and forget it."""
    cache.release(ME, ask(cache, SPACE, range(128)), now=0.0)
    cache.reset(SPACE)


def come_back(cache: PrefixCache, number: int) -> None:
    """Ask again for what was evicted a moment ago: it is a ghost, and then it is none."""
    at = 1000 * (number % 2)
    cache.release(ME, ask(cache, SPACE, range(at, at + 80), number / 1e4), now=number / 1e4)


def one_tenant_each(cache: PrefixCache, number: int) -> None:
    """A tenant for each request, as who runs without identities may name them."""
    if number == 0:
        cache.wipe_with(lambda _: None)
    space = Namespace(f"model {number}", tenant=f"tenant {number}", salt="s")
    cache.release(ME, ask(cache, space, range(3)), now=0.0)
    cache.quit(ME, space)


def one_worker_each(cache: PrefixCache, number: int) -> None:
    """A worker for each request, who dies of it."""
    worker = WorkerId(number)
    cache.attach(worker, SPACE, now=0.0)
    cache.acquire(worker, SPACE, pack(range(5)), request_id=str(number), now=0.0)
    cache.detach(worker, now=0.0, gone=False)
    cache.worker_gone(worker, now=0.0)


def levels_for_hours(cache: PrefixCache, number: int) -> None:
    """Access again and again what has a level for a very long time."""
    if number == 0:
        cache.rank(SPACE, 7, ttl_s=1e9)
    ask_the_same(cache, number)


CASES = [
    *[(policy, habit) for policy in POLICIES for habit in (ask_the_same, use_once, copy_a_part)],
    *[(policy, use_whole_blocks) for policy in ("slru", "priority")],
    ("lru", come_back),
    *[("lru", one) for one in (give_up_waiting, go_back_and_forth, reset_each_time)],
    *[("lru", one) for one in (one_tenant_each, one_worker_each)],
    ("priority", levels_for_hours),
]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "habit"), CASES)
def test_a_habit_goes_on_for_ever(
    policy: str, habit: Callable[[PrefixCache, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is done again and again: what is kept does not grow with how often it was done."""
    monkeypatch.setattr(lease, "_SPARE_DEADLINES", 64)
    cache = PrefixCache(64, 2, policy=policy, history_bytes=0)
    sizes = []
    for number in range(4500):
        habit(cache, number)
        if number >= 1500 and number % 100 == 0:
            sizes.append(size(cache))
    half = len(sizes) // 2
    assert max(sizes[half:]) <= 1.1 * max(sizes[:half])


def test_levels_are_given_by_hand_to_so_many() -> None:
    cache = PrefixCache(8, 2, policy="priority")
    for number in range(MAX_RANKS):
        cache.rank(Namespace("m", salt=str(number)), 7)
    with pytest.raises(InvalidRequest, match=f"{MAX_RANKS} namespaces have a level"):
        cache.rank(SPACE, 7)
    cache.rank(Namespace("m", salt="0"), NORMAL)
    cache.rank(SPACE, 7)
    assert "0" not in salts(cache)
