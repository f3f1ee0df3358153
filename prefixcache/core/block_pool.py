"""The physical blocks: which are free, who else holds one, and which nobody may touch.

```
            allocate                 release (last owner)
   FREE ───────────────► LIVE ───────────────────────────► FREE
                           │ quarantine                       ▲
                           └───────────► QUARANTINED ─────────┘ release_quarantine
```

A live block has one owner: a lease (its private blocks) or the tree (its indexed blocks).  Handing
a block from a lease to the tree changes nothing here.  Further owners are rare (the source of a
copy, the last block that forked leases share) and counted in `shares`; the block is free when the
last one lets go.  Live blocks with several owners have a state of their own, so that giving back a
run, in which there is none as a rule, costs one look at all states and no look at the blocks.

**The last tenant** of a block is known, so that nobody is lent what another tenant wrote.

```
block    lent to a      free, cached, …      lent to b: wiped first      lent to b again: as it is
```

While one tenant alone has used the pool, nothing is kept up to date and nothing is looked at.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prefixcache.errors import PoolExhausted
from prefixcache.texts import many
from prefixcache.types import BlockId, BlockTable, LeaseId, WorkerId

_FREE, _LIVE, _SHARED, _QUARANTINED, _RESERVED = 0, 1, 2, 3, 4

_OF_NO_LEASE = LeaseId(0)
"""What an earlier life of the pool left in quarantine."""

_AHEAD = 1024
_SHORT_RUN = 64
"""Up to this many blocks a Python loop over a bytearray beats the fixed cost of a numpy call."""


class WriteListener(Protocol):
    """What hears who may write: exactly the blocks that were given, and not ended since."""

    def given(self, blocks: BlockTable) -> None:
        """Hear that a lease may write to these blocks."""

    def ended(self, blocks: BlockTable) -> None:
        """Hear that nobody may write to these blocks (any more)."""


class BlockPool:
    """The ids `first` … `end - 1` and their owners.

    Free ids are a stack plus a bump pointer: taking and giving back a run is a slice.

    Args:
        num_blocks: How many can be lent.
        first: The first of them.  Ids below it are blocks of the memory that nobody is ever lent.
    """

    __slots__ = (
        "_ahead",
        "_ahead_until",
        "_bump",
        "_num_quarantined",
        "_quarantine",
        "_stack",
        "_state",
        "_states",
        "end",
        "first",
        "num_blocks",
        "num_free",
        "num_quarantined",
        "refs",
        "write_listener",
    )

    def __init__(self, num_blocks: int, first: int = 0) -> None:
        self.num_blocks = num_blocks
        self.first = first
        self.end = first + num_blocks
        """Ids are below: what is kept for each id has room for so many."""
        self.num_free = num_blocks
        """Blocks that `allocate` can give."""
        self.refs: dict[int, int] = {}
        """Owners of a block beyond its first; only blocks that have any."""
        self.write_listener: WriteListener | None = None
        """Who hears which blocks may be written to."""
        self._stack: BlockTable = array("i")
        self._bump = first
        self._ahead: BlockTable = array("i")
        self._ahead_until = first
        """The end of the ids in `_ahead`: these and all before them are counted already."""
        self._state = bytearray([_RESERVED]) * first + bytearray(num_blocks)
        self._states = np.frombuffer(self._state, dtype=np.uint8)  # the same memory
        self._quarantine: dict[WorkerId, dict[LeaseId, BlockTable]] = {}
        """By who may still write to them, and the lease that gave the right."""
        self._num_quarantined: Counter[WorkerId] = Counter()
        self.num_quarantined = 0
        """Blocks that nobody may use until their last writer is known to be gone."""

    @property
    def num_used(self) -> int:
        """Ids below this one may have been given before, all others never."""
        return self._bump

    def count_quarantined(self, worker: WorkerId) -> int:
        """Give how many of the quarantined blocks wait for that writer.  O(1)."""
        return self._num_quarantined[worker]

    def count_quarantined_leases(
        self, worker: WorkerId, lease: LeaseId | None = None
    ) -> dict[LeaseId, int]:
        """Give how many blocks wait for that writer, by lease, or of one lease.  O(leases)."""
        leases = self._quarantine.get(worker, {})
        if lease is not None:
            leases = {lease: leases[lease]} if lease in leases else {}
        return {one: len(ids) for one, ids in leases.items()}

    def allocate(self, count: int) -> BlockTable:
        """Take `count` free blocks.  O(count), in C for long runs.

        Raises:
            PoolExhausted: fewer are free; nothing was taken.
        """
        stack = self._stack
        have = len(stack)
        if count <= have:
            ids = stack[have - count :]
            del stack[have - count :]
            self._mark(ids, _LIVE)
        else:
            fresh = count - have
            if fresh > self.end - self._bump:
                raise PoolExhausted(f"needs {many(count, 'block')}; {self.num_free:,} free")
            ids = self._never_given(fresh)
            if have:
                self._mark(stack, _LIVE)
                ids = stack + ids
                del stack[:]
        self.num_free -= count
        if self.write_listener is not None:
            self.write_listener.given(ids)
        return ids

    def _never_given(self, count: int) -> BlockTable:
        """Take the next ids that were never given: a slice of some that are counted in advance."""
        start, end = self._bump, self._bump + count
        at = len(self._ahead) - (self._ahead_until - start)
        if end > self._ahead_until:
            self._ahead_until = min(max(end, start + _AHEAD), self.end)
            ids = np.arange(start, self._ahead_until, dtype=np.int32)
            self._ahead, at = array("i", ids.tobytes()), 0
        self._bump = end
        self._state[start:end] = bytes((_LIVE,)) * count
        return self._ahead[at : at + count]

    def release(self, ids: BlockTable) -> int:
        """Let one owner of each block go; free those that had no other.  O(blocks).

        Returns:
            How many became free.
        """
        if several := self._others(ids, _LIVE):
            for block in several:
                self._unshare(block)
            gone = set(several)
            ids = array("i", [block for block in ids if block not in gone])
        self._mark(ids, _FREE)
        if self.write_listener is not None:
            self.write_listener.ended(ids)
        self._stack.extend(ids)
        self.num_free += len(ids)
        return len(ids)

    def release_one(self, block: BlockId) -> None:
        """Let one owner of a block go; free it if that was the last.  O(1)."""
        if self._state[block] == _SHARED:
            self._unshare(block)
        else:
            self.release(array("i", [block]))

    def restore(self, indexed: BlockTable, aside: BlockTable, worker: WorkerId) -> None:
        """Begin anew, with some blocks owned by the tree and some quarantined.  O(num_blocks).

        Args:
            indexed: What the tree owns.
            aside: What `worker` may still write to; `release_quarantine` frees them.
            worker: Who.
        """
        self._states[self.first :] = _FREE
        self._states[np.frombuffer(indexed, np.int32)] = _LIVE
        self._states[np.frombuffer(aside, np.int32)] = _QUARANTINED
        self._quarantine = {worker: {_OF_NO_LEASE: aside[:]}} if aside else {}
        self._num_quarantined = Counter({worker: len(aside)})
        self.num_quarantined = len(aside)
        used = np.flatnonzero(self._states)
        self._bump = int(used[-1]) + 1 if len(used) else self.first
        self._ahead, self._ahead_until = array("i"), self._bump
        free = np.flatnonzero(self._states[: self._bump] == _FREE)[::-1]
        self._stack = array("i", free.astype(np.int32).tobytes())
        self.num_free = len(self._stack) + self.end - self._bump

    def add_ref(self, block: BlockId) -> None:
        """Add an owner to a live block."""
        if self._state[block] == _FREE:
            raise AssertionError(f"block {block} is free and cannot be shared")
        if self._state[block] == _LIVE:
            self._state[block] = _SHARED
        self.refs[block] = self.refs.get(block, 0) + 1

    def add_refs(self, blocks: BlockTable) -> None:
        """Add an owner to each of some live blocks, all of them different ones.  O(blocks)."""
        states = np.frombuffer(blocks, np.int32)
        if not np.isin(self._states[states], (_LIVE, _SHARED)).all():
            raise AssertionError("a block that is not live cannot be shared")
        self._states[states] = _SHARED
        refs = self.refs
        refs.update([(block, refs.get(block, 0) + 1) for block in blocks])

    def quarantine(self, worker: WorkerId, lease: LeaseId, ids: BlockTable) -> int:
        """Set live blocks aside that `worker` may still write to, though its `lease` has ended.

        Returns:
            How many were set aside.
        """
        if not ids:
            return 0
        for block in self._others(ids, _LIVE):
            if self._state[block] != _SHARED:
                raise AssertionError(_wrong(block, self._state[block], _LIVE))
        self._mark(ids, _QUARANTINED)
        self._quarantine.setdefault(worker, {})[lease] = ids
        self._num_quarantined[worker] += len(ids)
        self.num_quarantined += len(ids)
        return len(ids)

    def release_quarantine(self, worker: WorkerId, lease: LeaseId | None = None) -> int:
        """Free the blocks that were set aside for a worker that can no longer write.

        O(blocks + leases they were of).

        Args:
            worker: Which.
            lease: Only those of one of its leases.

        Returns:
            How many became free.
        """
        leases = self._quarantine.get(worker)
        if leases is None or (lease is not None and lease not in leases):
            return 0
        if lease is None:
            ids = array("i", b"".join(one.tobytes() for one in leases.values()))
            leases.clear()
        else:
            ids = leases.pop(lease)
        if not leases:
            del self._quarantine[worker]
        self._num_quarantined[worker] -= len(ids)
        if not self._num_quarantined[worker]:
            del self._num_quarantined[worker]
        self.num_quarantined -= len(ids)
        self._expect(ids, _QUARANTINED)
        self._mark(ids, _LIVE)
        for block in self.refs.keys() & ids:
            self._state[block] = _SHARED
        return self.release(ids)

    def _unshare(self, block: int) -> None:
        """Let one of several owners go."""
        others = self.refs.get(block)
        if others is None:
            raise AssertionError(_wrong(block, self._state[block], _LIVE))
        if others > 1:
            self.refs[block] = others - 1
            return
        del self.refs[block]
        if self._state[block] == _SHARED:
            self._state[block] = _LIVE

    def _expect(self, ids: BlockTable, was: int) -> None:
        """Assert that all blocks are in a state: whoever gives back twice is found out here."""
        for block in self._others(ids, was):
            raise AssertionError(_wrong(block, self._state[block], was))

    def _others(self, ids: BlockTable, was: int) -> list[int]:
        """Give the blocks that are not in a state.  As a rule none."""
        if len(ids) <= _SHORT_RUN:
            state = self._state
            return [block for block in ids if state[block] != was]
        index = np.array(ids, np.intp)  # numpy indexes by int32 at a third of the speed
        states = self._states[index].tobytes()
        if states.count(was) == len(states):
            return []
        return [block for block, state in zip(ids, states, strict=True) if state != was]

    def _mark(self, ids: BlockTable, now: int) -> None:
        """Bring blocks into a state."""
        if len(ids) <= _SHORT_RUN:
            state = self._state
            for block in ids:
                state[block] = now
        else:
            self._states[np.array(ids, np.intp)] = now

    def states(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Say of every id whether its block is live, and whether quarantined.  O(blocks), in C."""
        live = (self._states == _LIVE) | (self._states == _SHARED)
        return live, self._states == _QUARANTINED

    def count_owners(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Count the owners that are known here, and those that each block should have.

        Asserts that states, free list and counts agree with each other.  O(blocks), in C.
        """
        owners = np.zeros(self.end, np.int32)
        np.add.at(owners, np.array(self._stack, np.intp), 1)
        owners[self._bump :] += 1
        wrong = np.flatnonzero((owners == 1) != (self._states == _FREE))
        assert not len(wrong), f"block {wrong[0]}: state {self._state[wrong[0]]}, in the free list"
        free = int(owners.sum())
        assert free == self.num_free, f"{free} blocks in the free list, not {self.num_free}"
        reserved = self._states[: self.first] == _RESERVED
        assert reserved.all(), f"block {int(reserved.argmin())} is never lent, and was"
        owners[: self.first] += 1  # nobody's, for good: with any owner there are too many
        waiting: BlockTable = array("i")
        for worker, leases in self._quarantine.items():
            assert leases, f"an empty quarantine of worker {worker}"
            for ids in leases.values():
                waiting.extend(ids)
            count = sum(map(len, leases.values()))
            assert count == self._num_quarantined[worker], f"{count} blocks wait for {worker}"
        np.add.at(owners, np.array(waiting, np.intp), 1)
        total = self._num_quarantined.total()
        assert total == self.num_quarantined, f"{total} blocks wait, not {self.num_quarantined}"
        expected = np.ones(self.end, np.int32)
        expected[list(self.refs)] += np.array(list(self.refs.values()), np.int32)
        bad = np.where(expected > 1, self._states == _LIVE, self._states == _SHARED)
        wrong = np.flatnonzero(bad)
        assert not len(wrong), f"block {wrong[0]}: {expected[wrong[0]] - 1} more owners"
        return owners, expected

    def check(self, owned: BlockTable, held: BlockTable) -> None:
        """Assert that every block has exactly the owners it should have.  O(blocks), in C.

        Args:
            owned: Blocks that leases and the tree own; one that is there twice has two owners.
            held: Further references.
        """
        known, expected = self.count_owners()
        owners = known.copy()
        # A block whose owner let go while somebody still holds it is owned by its holders.
        for blocks in (owned, held):
            for block in (min(blocks, default=0), max(blocks, default=0)):
                assert 0 <= block < self.end, f"block {block} is none of the pool"
            np.add.at(owners, np.array(blocks, np.intp), 1)
        wrong = np.flatnonzero(owners != expected).tolist()
        if wrong:
            block = wrong[0]
            raise AssertionError(
                f"block {block}: {owners[block]} owners, expected {expected[block]} "
                f"(free, quarantined or never lent {known[block]}, of leases and the tree "
                f"{owned.count(block)}, held {held.count(block)})"
            )


def _wrong(block: int, state: int, was: int) -> str:
    names = ("free", "live", "shared", "quarantined", "never lent")
    return f"block {block} is {names[state]}, expected {names[was]}: an owner let go twice"


Wipe = Callable[[BlockTable], None]
"""Overwrites blocks, in every layer, with zeros.  Returns when it is done."""

_CLEAN, _UNKNOWN = 0, -1
"""Tenants are numbered from 1."""
_SPARE_NUMBERS = 1024
"""Of tenants without a block, which may be kept beside twice as many as there are blocks."""
_SHORT_LOAN = 24
"""Up to this many blocks a Python loop beats the fixed cost of numpy calls."""


class LastTenant:
    """The last tenant of every block.

    Args:
        num_ids: Of the pool, which holds nothing but zeros yet: ids are below.
    """

    __slots__ = ("_last", "_num_ids", "_numbers", "_of", "_only", "wipe")

    def __init__(self, num_ids: int) -> None:
        self.wipe: Wipe | None = None
        """None where there is no memory to wipe."""
        self._num_ids = num_ids
        self._of = np.zeros(0, np.int32)
        self._numbers: dict[str, int] = {}
        """Of the tenants whose data some block may hold; of others, a few."""
        self._last = 0
        self._only: str | None = None
        """The one tenant so far: all that is not clean may be its."""

    def assign(self, blocks: BlockTable, tenant: str, num_used: int) -> None:
        """Wipe what another tenant has used, before `tenant` may read it.

        O(1) while there is one tenant; else O(blocks), and the wiping of those that change hands.

        Args:
            blocks: About to be lent.
            tenant: To whom.
            num_used: Ids below this one may have been lent before, all others never.
        """
        if self.wipe is None or not blocks:
            return
        if not self._numbers:
            if self._only is None:
                self._only = tenant
            if self._only == tenant:
                return
            first = self._number(self._only)
            self._of = np.zeros(self._num_ids, np.int32)
            self._of[:num_used] = first
        mine = self._number(tenant)
        of = self._of
        if len(blocks) <= _SHORT_LOAN:
            foreign = array("i", [one for one in blocks if of[one] not in (mine, _CLEAN)])
            for one in blocks:
                of[one] = mine
        else:
            index = np.frombuffer(blocks, np.int32)
            last = of[index]
            foreign = array("i")
            foreign.frombytes(index[(last != mine) & (last != _CLEAN)].tobytes())
            of[index] = mine
        if foreign:
            self.wipe(foreign)

    def restore(self, runs: Iterable[tuple[str, BlockTable]]) -> None:
        """Take over a pool of an earlier life: what is not in a run may hold anybody's data."""
        self._of = np.full(self._num_ids, _UNKNOWN, np.int32)
        for tenant, blocks in runs:
            self._of[np.frombuffer(blocks, np.int32)] = self._number(tenant)
        if not self._numbers:
            self._number("")

    def _number(self, tenant: str) -> int:
        """Give a tenant's number.  Amortised O(1): those without a block are forgotten in bulk."""
        found = self._numbers.get(tenant)
        if found is None:
            if len(self._numbers) >= 2 * self._num_ids + _SPARE_NUMBERS:
                there = set(np.unique(self._of).tolist())
                self._numbers = {name: n for name, n in self._numbers.items() if n in there}
            self._last += 1
            found = self._numbers[tenant] = self._last
        return found
