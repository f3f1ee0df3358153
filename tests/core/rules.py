"""The rules of the machine: every verb, with arguments drawn so that everything collides.

The same rules run under hypothesis (which shrinks what it finds) and under a seeded driver (for
volume).  A rule draws through `Draw.below` only, acts on the cache, and updates the world.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from core.innards import indexed_below
from core.oracle import Tokens
from core.world import LeaseView, PinView, TicketView, World
from prefixcache.errors import (
    CacheError,
    InvalidRequest,
    LeaseExpired,
    NotFound,
    PoolExhausted,
)
from prefixcache.types import (
    Again,
    Grant,
    LeaseId,
    Namespace,
    TicketId,
    Waiting,
    WorkerId,
    pack,
    unpack,
)

Thing = TypeVar("Thing")
Answer = TypeVar("Answer")

MAX_WORKERS = 3
MAX_LEASES = 6
NEVER_SENT = 99


class Draw(Protocol):
    """The only source of choice."""

    def below(self, bound: int) -> int:
        """Give an integer from 0 to `bound` - 1."""


class Rules:
    """One world and the rules that move it."""

    def __init__(self, world: World, draw: Draw) -> None:
        self.world = world
        self.draw = draw

    # ------------------------------------------------------------------ drawing

    def choose(self, things: Sequence[Thing]) -> Thing:
        return things[self.draw.below(len(things))]

    def chance(self, percent: int) -> bool:
        return self.draw.below(100) >= 100 - percent

    def some_tokens(self, most: int) -> Tokens:
        return tuple(
            self.draw.below(self.world.shape.vocabulary) for _ in range(self.draw.below(most + 1))
        )

    def prompt(self) -> Tokens:
        """Mostly a continuation, or a cut, of an earlier prompt."""
        world = self.world
        size = world.shape.block_size
        start: Tokens = ()
        if world.prompts and self.chance(75):
            start = self.choose(world.prompts)
            if self.chance(50):
                start = start[: self.draw.below(len(start) + 1)]
        if world.mixed and self.chance(30):
            start = self.choose(world.mixed)
        tokens = start + self.some_tokens(2 * size + 1)
        if world.shape.segments and world.prompts and self.chance(30):
            other = self.choose(world.prompts)
            tokens += other[self.draw.below(len(other)) :]
        if not self.chance(5):
            tokens = tokens[: max(1, world.shape.num_blocks * size * 2 // 3)]
        tokens = tokens or (self.draw.below(world.shape.vocabulary),)
        world.prompts = [*world.prompts[-7:], tokens]
        return tokens

    def lease(self) -> LeaseView | None:
        return self.choose(list(self.world.leases.values())) if self.world.leases else None

    def attached(self) -> tuple[WorkerId, Namespace] | None:
        pairs = [(one, space) for one, spaces in self.world.workers.items() for space in spaces]
        return self.choose(sorted(pairs, key=repr)) if pairs else None

    # ------------------------------------------------------------------ calling

    def call(self, line: str, verb: Callable[[], Answer]) -> Answer | CacheError:
        """Call a verb; if it fails, see that it has changed nothing."""
        world = self.world
        before = world.frozen()
        world.log.append(line)
        try:
            return verb()
        except CacheError as raised:
            error = raised
        world.log.append(f"#   {type(error).__name__}: {error}")
        world.count(type(error).__name__)
        assert str(error), "an error without a message"
        if isinstance(error, PoolExhausted):
            assert error.retry_after_s >= 0
        assert world.frozen() == before, f"{line} failed and changed something"
        return error

    def fails(self, line: str, verb: Callable[[], object], *errors: type[CacheError]) -> None:
        """Call a verb that must fail."""
        answer = self.call(line, verb)
        assert isinstance(answer, errors), f"{line} should fail, and gave {answer}"

    def touch(self, view: LeaseView, *, succeeded: bool) -> None:
        """Any call about a lease is a sign of life."""
        until = self.world.now + self.world.shape.ttl_s
        view.due_at_latest = max(view.due_at_latest, until)
        if succeeded:
            view.due = max(view.due, until)

    def about(self, view: LeaseView, verb: str, arguments: str = "") -> str:
        comma = ", " if arguments else ""
        return f"cache.{verb}({view.worker!r}, {view.id}{comma}{arguments}, now={self.world.now})"

    # ------------------------------------------------------------------ workers and time

    def attach(self) -> None:
        world = self.world
        if world.workers and (len(world.workers) >= MAX_WORKERS or self.chance(50)):
            worker = self.choose(sorted(world.workers))
        else:
            worker = WorkerId(world.num_workers)
            world.num_workers += 1
        namespace = self.choose(world.namespaces)
        world.log.append(f"cache.attach({worker!r}, {namespace!r}, now={world.now})")
        world.cache.attach(worker, namespace, now=world.now)
        world.workers.setdefault(worker, set()).add(namespace)
        self.renewed(worker)

    def renewed(self, worker: WorkerId) -> None:
        for view in self.world.leases.values():
            if view.worker == worker:
                self.touch(view, succeeded=True)

    def renew(self) -> None:
        world = self.world
        if world.workers:
            worker = self.choose(sorted(world.workers))
            world.log.append(f"cache.renew({worker!r}, now={world.now})")
            world.cache.renew(worker, now=world.now)
            self.renewed(worker)

    def let_time_pass(self) -> None:
        self.world.now += self.world.shape.ttl_s * (1 + self.draw.below(9)) / 8
        self.world.log.append(f"# now {self.world.now}")

    def expire(self) -> None:
        world = self.world
        must = {one.key for one in world.leases.values() if one.due_at_latest < world.now}
        may = {one.key for one in world.leases.values() if one.due <= world.now}
        late = [one.id for one in world.tickets.values() if one.deadline < world.now]
        world.log.append(f"cache.expire(now={world.now})")
        ended = world.cache.expire(now=world.now)
        self.forget_pins(lambda one: one.until < world.now)
        alive = {(world.worker_named(info.worker), info.lease) for info in world.snapshot().leases}
        over = world.leases.keys() - alive
        assert sorted(ended.leases) == sorted(lease for _, lease in over)
        for key in sorted(over):
            world.end(world.leases[key], writes_on=True)
            world.count("expired")
        assert must <= over <= may, f"expired {over}; due {must} to {may}"
        assert ended.num_freed + ended.num_quarantined >= 0
        world.settle()
        assert not set(late) & set(world.tickets), "an overdue ticket was not settled"

    def detach(self) -> None:
        world = self.world
        if not world.workers:
            return
        worker = self.choose(sorted(world.workers))
        gone = self.chance(50)
        world.log.append(f"cache.detach({worker!r}, now={world.now}, gone={gone})")
        before = world.snapshot()
        ended = world.cache.detach(worker, now=world.now, gone=gone)
        mine = [view for view in world.leases.values() if view.worker == worker]
        assert sorted(ended.leases) == sorted(view.id for view in mine)
        for view in mine:
            world.end(view, writes_on=not gone)
        for ticket in [one for one in world.tickets.values() if one.worker == worker]:
            del world.tickets[ticket.id]
        del world.workers[worker]
        world.begun = {key: view for key, view in world.begun.items() if key[0] != worker}
        self.fails(
            f"cache.renew({worker!r}, now={world.now})",
            lambda: world.cache.renew(worker, now=world.now),
            NotFound,
        )
        if gone:
            world.zombies.pop(worker, None)
            assert not ended.num_quarantined
        elif not world.tickets:  # else a waiting request may have taken what came back
            assert world.snapshot().free == before.free + ended.num_freed
            assert world.snapshot().quarantined == before.quarantined + ended.num_quarantined
        world.count("detached" if gone else "died")

    def worker_gone(self) -> None:
        world = self.world
        if not world.zombies and not self.chance(10):
            return
        known = sorted({*world.zombies, *world.workers})
        if not known:
            return
        worker = self.choose(known)
        world.log.append(f"cache.worker_gone({worker!r}, now={world.now})")
        before = world.snapshot()
        freed = world.cache.worker_gone(worker, now=world.now)
        for view in [one for one in world.leases.values() if one.worker == worker]:
            world.end(view, writes_on=False)
        for ticket in [one for one in world.tickets.values() if one.worker == worker]:
            del world.tickets[ticket.id]
        if world.workers.pop(worker, None) is not None:
            world.begun = {key: view for key, view in world.begun.items() if key[0] != worker}
        world.zombies.pop(worker, None)
        after = world.snapshot()
        if not world.tickets:  # else a waiting request may have taken what came back
            assert after.free == before.free + freed
            assert after.quarantined <= before.quarantined
        world.count("absolved")

    def scribble(self) -> None:
        """A dead worker goes on writing rubbish for a while; a living one tries something."""
        world = self.world
        everybody = [
            *world.leases.values(),
            *(one for gone in world.zombies.values() for one in gone),
        ]
        if everybody:
            view = self.choose(everybody)
            for block, offset in world.writable(view):
                world.memory.write(block, offset, None)
            world.log.append(f"# {view.worker} writes rubbish to its own slots of lease {view.id}")

    # ------------------------------------------------------------------ acquire

    def acquire(self) -> None:
        world = self.world
        who = self.attached()
        if who is None or len(world.leases) >= MAX_LEASES:
            return
        worker, namespace = who
        tokens = self.prompt()
        reserve = self.draw.below(2 * world.shape.block_size + 1) if self.chance(30) else 0
        wait_s = 1.0 + self.draw.below(10) if self.chance(40) else 0.0
        request_id = f"r{self.draw.below(3)}" if self.chance(20) else ""
        # Who asks for less than everything does not wait for a flight here: see test_reuse.
        reuse = bool(wait_s) or not self.chance(12)
        min_partial = 0 if wait_s else self.draw.below(world.shape.block_size + 2)
        for_room = not (wait_s and self.chance(25))
        earlier = [
            view
            for view in world.leases.values()
            if request_id and (view.worker, view.request_id) == (worker, request_id)
        ]
        waiting = [
            one
            for one in world.tickets.values()
            if request_id and (one.worker, one.request_id) == (worker, request_id)
        ]
        if waiting:
            return  # a request that waits is cancelled or settled before it is repeated
        again = self.some_again() if world.shape.segments and reuse else None
        if earlier and self.chance(70):
            _, tokens, reserve, reuse, min_partial, again = earlier[0].asked
        line = (
            f"cache.acquire({worker!r}, {namespace!r}, pack({list(tokens)}), reserve={reserve}, "
            f"wait_s={wait_s}, request_id={request_id!r}, reuse={reuse}, "
            f"min_partial={min_partial}, for_room={for_room}, segments={again}, now={world.now})"
        )
        before = world.snapshot()
        found = world.cache.lookup(namespace, pack(tokens))
        cached = found.num_hit + found.num_partial
        hit = found.num_hit if reuse else 0
        expected = world.found(namespace, tokens)
        has_segments = again is not None and self.has_segments(namespace, tokens, again, cached)
        answer = self.call(
            line,
            lambda: world.cache.acquire(
                worker,
                namespace,
                pack(tokens),
                reserve=reserve,
                wait_s=wait_s,
                request_id=request_id,
                reuse=reuse,
                min_partial=min_partial,
                for_room=for_room,
                segments=again,
                now=world.now,
            ),
        )
        asked = (namespace, tokens, reserve, reuse, min_partial, again)
        if earlier and earlier[0].asked != asked:
            if world.blocks_for(len(tokens) + reserve) <= world.shape.num_blocks:
                assert isinstance(answer, CacheError), "another request was answered as the first"
            assert world.snapshot() == before, "a refused request changed something"
            world.count("refused for its id")
            return
        if earlier:
            assert answer == earlier[0].grant, "a repeated acquire gave another grant"
            world.count("repeated")
            for view in earlier:
                self.touch(view, succeeded=True)
            return
        if isinstance(answer, InvalidRequest):
            assert world.blocks_for(len(tokens) + reserve) > world.shape.num_blocks
            return
        assert cached == expected, f"finds {cached} tokens; {expected} can be reused"
        needed = world.blocks_for(len(tokens) + reserve) - hit // world.shape.block_size
        if isinstance(answer, CacheError):
            assert isinstance(answer, PoolExhausted)
            blocks = hit // world.shape.block_size
            assert world.is_justified(needed, blocks, before, namespace, answer), (
                f"needed {needed}: {answer}; {before}"
            )
            assert (
                not wait_s
                or not for_room
                or "wait for room already" in str(answer)
                or self.is_hopeless(namespace, world.blocks_for(len(tokens) + reserve))
            )
            return
        pending = world.in_flight(namespace, tokens) - cached
        if isinstance(answer, Waiting):
            assert wait_s > 0
            assert answer.ticket not in world.tickets
            if answer.owner is None:
                assert for_room
                blocks = hit // world.shape.block_size
                assert answer.num_pending == 0
                closed = world.cache._lessor.waiting.line.is_blocked_by_head(None)
                assert closed or world.is_justified(needed, blocks, before, namespace)
                world.count("waiting for room")
            else:
                assert 0 < answer.num_pending <= pending, f"{answer}, but {pending} in flight"
                owners = [one for one in world.leases.values() if one.id == answer.owner]
                assert namespace in {one.namespace for one in owners}
            world.tickets[answer.ticket] = TicketView(
                answer.ticket,
                worker,
                namespace,
                tokens,
                asked,
                world.now + wait_s,
                request_id,
                found.num_hit if answer.owner is not None else None,
            )
            world.count("waiting")
            return
        assert isinstance(answer, Grant)
        assert not (wait_s and pending > 0), f"did not wait for {pending} tokens in flight"
        if answer.approximate:
            view = world.admit(answer, worker, tokens, asked, request_id)
            needed = world.blocks_for(len(tokens) + reserve)
            needed -= 0 if view.is_untold else answer.num_cached // world.shape.block_size
            assert needed <= before.free + before.leaving + before.evictable
            world.verify_evictions(needed, before)
            return
        if world.blocks_for(len(tokens) + reserve) <= before.free and namespace not in world.quotas:
            assert not has_segments, f"found no segments of {tokens}"
        assert needed <= before.free + before.leaving + before.evictable
        if not reuse:
            assert answer.num_cached == answer.num_pending == 0
            assert answer.ledger.granularity >= cached
            world.count("reuses nothing")
        elif found.num_partial < min_partial:
            assert answer.num_cached == found.num_hit
            assert not answer.copies
        elif answer.num_cached != cached:  # the source of a copy may not fit in
            assert needed > before.free - sum(not locked for locked in world.forgotten.values())
            assert answer.num_cached == found.num_hit
        assert answer.num_pending <= max(0, pending + cached - answer.num_cached)
        assert answer.ledger.joined == 0
        world.admit(answer, worker, tokens, asked, request_id)
        world.verify_evictions(needed, before)

    def some_again(self) -> Again | None:
        size = self.world.shape.block_size
        return self.choose(
            [None, Again(), Again(), Again(1 + self.draw.below(size + 1)), Again(share=0.5)]
        )

    def has_segments(self, namespace: Namespace, tokens: Tokens, again: Again, cached: int) -> bool:
        """Whether some whole block that is stored is in a prompt behind what is cached."""
        size, root = self.world.shape.block_size, self.world.root(namespace)
        if root is None or again.first >= size:
            return False
        blocks = {
            entry.prefix[-size:] for entry in indexed_below(root, size) if entry.num_tokens == size
        }
        places = range(cached, len(tokens) - size)
        return any(tokens[at : at + size] in blocks for at in places)

    def acquire_wrongly(self) -> None:
        world = self.world
        who = self.attached()
        if who is None:
            return
        worker, namespace = who
        match self.draw.below(5):
            case 0:
                other, tokens, errors = worker, b"", InvalidRequest
            case 1:
                other, tokens, errors = worker, b"\0\0\0\0\0", InvalidRequest
            case 2:
                other, tokens, errors = WorkerId(-1), pack([0]), NotFound
            case 3:
                missing = [one for one in world.namespaces if one not in world.workers[worker]]
                if not missing:
                    return
                other, tokens, errors = worker, pack([0]), NotFound
                namespace = missing[0]
            case _:
                other, errors = worker, InvalidRequest
                tokens = pack([0] * (world.shape.num_blocks * world.shape.block_size + 1))
        self.fails(
            f"cache.acquire({other!r}, {namespace!r}, {tokens!r}, now={world.now})",
            lambda: world.cache.acquire(other, namespace, tokens, now=world.now),
            errors,
        )

    def cancel(self) -> None:
        world = self.world
        if not world.tickets:
            return
        ticket = self.choose(list(world.tickets.values()))
        if self.chance(20):  # somebody else's ticket
            world.cache.cancel(WorkerId(-1), ticket.id, now=world.now)
            world.log.append(f"cache.cancel('nobody', {ticket.id}, now={world.now})")
            return
        del world.tickets[ticket.id]
        for again in range(2):
            world.log.append(f"cache.cancel({ticket.worker!r}, {ticket.id}, now={world.now})")
            world.cache.cancel(ticket.worker, ticket.id, now=world.now)
            if again:
                world.count("cancelled")

    # ------------------------------------------------------------------ a lease's life

    def commit(self) -> None:
        world = self.world
        view = self.lease()
        if view is None:
            return
        new = self.some_tokens(3) if self.chance(40) else ()
        tokens = view.tokens + new
        room = len(view.table) * world.shape.block_size
        most = min(len(tokens), room)
        if view.must_extend:
            most = min(most, view.valid)
        upto = most if self.chance(50) else view.valid + self.draw.below(most - view.valid + 1)
        world.compute(view, tokens, upto)
        answer = self.call(
            self.about(view, "commit", f"{upto}, pack({list(new)})"),
            lambda: world.cache.commit(view.worker, view.id, upto, pack(new), now=world.now),
        )
        assert not isinstance(answer, CacheError), f"{view.label}: {answer}"
        assert answer.num_tokens == upto
        touched = world.blocks_for(upto) - view.committed // world.shape.block_size
        assert 0 <= answer.num_indexed <= touched
        view.tokens, view.valid = tokens, upto
        view.sources, view.base, view.is_untold = set(), set(), False
        if view.namespace.approximate:
            world.mixed = [*world.mixed[-3:], tokens[:upto]]
        if view.root is not None and view.root is world.root(view.namespace):
            world.library.publish(view.namespace, tokens[:upto])
        world.prompts = [*world.prompts[-7:], tokens]
        self.touch(view, succeeded=True)

    def extend(self) -> None:
        world = self.world
        view = self.lease()
        if view is None:
            return
        size = world.shape.block_size
        upto = len(view.tokens) + self.draw.below(2 * size + 1)
        upto = min(upto, world.shape.num_blocks * size)
        wait_s = 1.0 + self.draw.below(10) if self.chance(40) else 0.0
        before = world.snapshot()
        mine = [one for one in world.tickets.values() if (one.worker, one.lease) == view.key]
        answer = self.call(
            self.about(view, "extend", f"{upto}, wait_s={wait_s}"),
            lambda: world.cache.extend(view.worker, view.id, upto, wait_s=wait_s, now=world.now),
        )
        if mine:
            assert isinstance(answer, InvalidRequest), f"{answer} while the lease waits for room"
            self.touch(view, succeeded=False)
            return
        unshare = view.must_extend and view.valid % size > 0 and upto > view.valid
        needed = max(0, world.blocks_for(upto) - len(view.table)) + unshare
        if isinstance(answer, CacheError | Waiting):
            assert isinstance(answer, PoolExhausted | Waiting)
            reason = None if isinstance(answer, Waiting) else answer
            assert world.is_justified(needed, 0, before, view.namespace, reason), (
                f"needed {needed}: {answer}; {before}"
            )
            assert not (reason and wait_s) or "wait for room already" in str(reason)
            self.touch(view, succeeded=False)
            if isinstance(answer, Waiting):
                world.tickets[answer.ticket] = TicketView(
                    answer.ticket,
                    view.worker,
                    view.namespace,
                    view.tokens,
                    (),
                    world.now + wait_s,
                    "",
                    None,
                    view.id,
                    upto,
                )
                world.count("waiting to grow")
            return
        assert needed <= before.free + before.leaving + before.evictable
        assert len(answer.blocks) == needed
        assert answer.keep == len(view.table) - unshare
        world.grow(view, upto, answer)
        world.verify_evictions(needed, before)
        self.touch(view, succeeded=True)

    def is_hopeless(self, namespace: Namespace, num_blocks: int) -> bool:
        """Whether a quota never allows so many blocks."""
        quotas = self.world.quotas
        limits = [quotas[one][0] for one in (namespace, namespace.tenant) if one in quotas]
        return any(most is not None and num_blocks > most for most in limits)

    def fork(self) -> None:
        world = self.world
        view = self.lease()
        if view is None or len(world.leases) >= MAX_LEASES:
            return
        world.run_copies(view)
        count = 1 + self.draw.below(2)
        answer = self.call(
            self.about(view, "fork", f"{count}"),
            lambda: world.cache.fork(view.worker, view.id, count, now=world.now),
        )
        self.touch(view, succeeded=not isinstance(answer, CacheError))
        if isinstance(answer, CacheError):
            assert isinstance(answer, InvalidRequest)
            assert not view.committed
            return
        assert len(answer) == count
        for grant in answer:
            assert grant.num_cached == grant.ledger.total == grant.ledger.reused == view.valid
            assert not grant.copies
            assert len(grant.block_table) == world.blocks_for(view.valid)
            assert (view.worker, grant.lease) not in world.leases
            world.leases[view.worker, grant.lease] = LeaseView(
                id=grant.lease,
                worker=view.worker,
                namespace=view.namespace,
                root=view.root,
                tokens=view.tokens[: view.valid],
                table=list(grant.block_table),
                valid=view.valid,
                prompt_len=view.valid,
                due=world.now + world.shape.ttl_s,
                due_at_latest=world.now + world.shape.ttl_s,
                must_extend=True,
            )
        world.count("forked")

    def truncate(self) -> None:
        world = self.world
        view = self.lease()
        if view is None:
            return
        world.run_copies(view)
        size = world.shape.block_size
        upto = self.draw.below(len(view.tokens) + 1)
        if self.chance(50):  # a little, as speculative decoding does
            upto = max(0, view.valid - self.draw.below(size + 1))
        before = world.snapshot()
        answer = self.call(
            self.about(view, "truncate", f"{upto}"),
            lambda: world.cache.truncate(view.worker, view.id, upto, now=world.now),
        )
        if isinstance(answer, CacheError):
            assert isinstance(answer, PoolExhausted)
            assert upto < view.valid
            assert upto % size
            assert world.is_justified(1, 0, before, view.namespace, answer), f"{answer}; {before}"
            self.touch(view, succeeded=False)
            return
        room = min(len(view.table), world.blocks_for(upto))
        world.update(view, answer)
        view.tokens = view.tokens[:upto]
        if upto < view.valid:
            world.count("rolled back")
            if answer.keep * size <= upto:  # the block it would write to next is not a shared one
                view.must_extend = False
        view.valid = min(view.valid, upto)
        view.prompt_len = min(view.prompt_len, upto)
        assert len(view.table) >= room, "no room for what is left"
        self.touch(view, succeeded=True)

    def release(self) -> None:
        world = self.world
        view = self.lease()
        if view is None:
            return
        before = world.snapshot()
        waiting = bool(world.tickets)
        line = self.about(view, "release")
        world.log.append(line)
        answer = world.cache.release(view.worker, view.id, now=world.now)
        world.end(view, writes_on=False)
        if not waiting:
            assert world.snapshot().free == before.free + answer.num_freed
        world.settle()
        frozen = world.frozen()
        assert world.cache.release(view.worker, view.id, now=world.now).num_freed == 0
        assert world.frozen() == frozen, "the second release changed something"

    def absolve(self) -> None:
        """A worker that was not heard of for long says that it has stopped writing somewhere."""
        world = self.world
        ended = [
            view
            for worker, views in world.zombies.items()
            for view in views
            if worker in world.workers
        ]
        if not ended:
            if self.chance(30):  # nobody is heard of, until all leases are over
                world.now += world.shape.ttl_s * 9 / 8
                self.expire()
            return
        view = self.choose(ended)
        before = world.snapshot()
        world.log.append(self.about(view, "release"))
        answer = world.cache.release(view.worker, view.id, now=world.now)
        world.zombies[view.worker].remove(view)
        if not world.zombies[view.worker]:
            del world.zombies[view.worker]
        after = world.snapshot()
        assert after.quarantined <= before.quarantined - answer.num_freed
        if not world.tickets:
            assert after.free == before.free + answer.num_freed
        world.count("absolved one lease")

    def misuse(self) -> None:
        """Calls that must fail, about living, ended, foreign and unknown leases."""
        world, cache, now = self.world, self.world.cache, self.world.now
        view = self.lease()
        kind = self.draw.below(9)
        if view is not None and kind < 6:
            self.touch(view, succeeded=False)
            worker, lease = view.worker, view.id
            known = len(view.tokens)
            match kind:
                case 0:
                    upto = min(known, len(view.table) * world.shape.block_size) + 1
                    verb = lambda: cache.commit(worker, lease, upto, now=now)  # noqa: E731
                case 1:
                    if not view.committed:
                        return
                    verb = lambda: cache.commit(worker, lease, view.valid - 1, now=now)  # noqa: E731
                case 2:
                    verb = lambda: cache.commit(worker, lease, known, b"\0\0", now=now)  # noqa: E731
                case 3:
                    verb = lambda: cache.fork(worker, lease, 0, now=now)  # noqa: E731
                case 4:
                    upto = known + 1
                    verb = lambda: cache.truncate(worker, lease, upto, now=now)  # noqa: E731
                case _ if any(
                    (one.worker, one.lease) == view.key for one in world.tickets.values()
                ):
                    return
                case _:
                    most = world.shape.num_blocks * world.shape.block_size
                    verb = lambda: cache.extend(worker, lease, most + 1, now=now)  # noqa: E731
            self.fails(self.about(view, f"misuse {kind}"), verb, InvalidRequest)
            if view.must_extend and view.valid % world.shape.block_size:
                self.fails(
                    self.about(view, "commit before extend"),
                    lambda: cache.commit(worker, lease, view.valid + 1, pack([0]), now=now),
                    InvalidRequest,
                )
            return
        others = [one for one in sorted(world.workers) if view is None or one != view.worker]
        if view is not None and others and kind < 8:
            other = self.choose(others)
            lease = view.id
            if (other, lease) in world.leases:
                return  # a number means a lease of who says it, never another's
            errors: tuple[type[CacheError], ...] = (NotFound, LeaseExpired)
        elif world.ended and kind < 8:
            ended = self.choose(world.ended)
            if ended.worker not in world.workers:
                return
            other, lease, errors = ended.worker, ended.id, (LeaseExpired,)
        elif world.workers:
            other, lease, errors = self.choose(sorted(world.workers)), LeaseId(10**6), (NotFound,)
        else:
            return
        verbs = [
            ("commit", lambda: cache.commit(other, lease, 1, now=now)),
            ("extend", lambda: cache.extend(other, lease, 1, now=now)),
            ("fork", lambda: cache.fork(other, lease, 1, now=now)),
            ("truncate", lambda: cache.truncate(other, lease, 0, now=now)),
        ]
        if errors == (NotFound,):
            verbs.append(("release", lambda: cache.release(other, lease, now=now)))
        for name, verb in verbs:
            self.fails(f"cache.{name}({other!r}, {lease}, ..., now={now})", verb, *errors)
        if lease == LeaseId(10**6):
            cache.cancel(other, TicketId(10**6), now=now)

    # ------------------------------------------------------------------ looking, steering

    def look(self) -> None:
        """`lookup` and `explain` find what the oracle finds, and change nothing."""
        world = self.world
        namespace, tokens = self.choose(world.namespaces), self.prompt()
        size = world.shape.block_size
        before = world.frozen()
        found = world.cache.lookup(namespace, pack(tokens))
        told = world.cache.explain(namespace, pack(tokens), now=world.now)
        world.cache.next_deadline()
        assert world.frozen() == before, "looking changed something"
        world.log.append(f"# look at {namespace} {tokens}: {found}")
        least, most = world.bounds(namespace, tokens)
        cached = found.num_hit + found.num_partial
        assert found.num_tokens == len(tokens)
        assert least <= cached <= most, f"{cached} of {tokens}: {least}..{most}"
        assert found.num_hit == cached // size * size
        pending = world.in_flight(namespace, tokens) - cached
        assert 0 <= found.num_pending <= max(0, pending)
        ledger = told.ledger
        assert ledger.total == len(tokens)
        assert (ledger.hit, ledger.partial, ledger.joined) == (found.num_hit, found.num_partial, 0)
        assert [span.start for span in told.spans] == [0, *(span.end for span in told.spans)][:-1]
        assert told.spans[-1].end == len(tokens)
        for span in told.spans:
            assert span.end - span.start == getattr(ledger, span.fate)
        stored = world.resident(namespace, tokens)
        assert cached == world.found(namespace, tokens), f"{found}: {stored} tokens are stored"
        assert ledger.granularity == stored - cached, f"{told}: {stored} tokens are stored"
        ever = world.library.longest_ever(namespace, tokens)
        assert ledger.evicted <= max(0, ever - stored), f"{told}: {ever} were ever stored"
        now = world.snapshot()
        if not now.evicted or not (now.ghosts or now.host_used or now.disk_used):
            assert not ledger.evicted
        if world.remembers_everything():
            seen = world.library.longest(namespace, tokens, multiple_of=size)
            assert stored + ledger.evicted == seen, f"{told}: {seen} were stored since the reset"
        assert 0 <= told.num_parted <= sum(map(len, world.ledgers.values()))
        if told.parted_at is None:
            assert not told.stored_next
        else:
            assert told.parted_at < len(tokens)
            stored_next = tuple(unpack(told.stored_next))
            assert stored_next[0] != tokens[told.parted_at]
            other = tokens[: told.parted_at] + stored_next
            assert world.library.longest_ever(namespace, other) == len(other), f"{told}"

    def reset(self) -> None:
        world = self.world
        if not self.chance(25):
            return
        namespace = self.choose(world.namespaces)
        root = world.root(namespace)
        world.log.append(f"cache.reset({namespace!r})")
        indexed = world.snapshot().indexed
        other = namespace._replace(approximate=True)
        gone = [one for one in (root, world.root(other)) if one is not None]
        answer = world.cache.reset(namespace)
        assert 0 <= answer.num_leased <= answer.num_blocks <= indexed
        world.retired.extend(gone)
        world.library.reset(namespace)
        world.library.reset(other)
        world.pins = [pin for pin in world.pins if pin.namespace != namespace]
        alive = world.leases.values()
        assert answer.num_leases == sum(any(one.root is root for root in gone) for one in alive)
        assert world.cache.lookup(namespace, pack([0, 1])).num_partial == 0
        world.count("reset")

    def pin(self) -> None:
        world = self.world
        namespace, tokens = self.choose(world.namespaces), self.prompt()
        size = world.shape.block_size
        ttl_s = 1.0 + self.draw.below(20)
        before = world.snapshot()
        whole = min(world.resident(namespace, tokens), len(tokens)) // size
        answer = self.call(
            f"cache.pin({namespace!r}, pack({list(tokens)}), ttl_s={ttl_s}, now={world.now})",
            lambda: world.cache.pin(namespace, pack(tokens), ttl_s=ttl_s, now=world.now),
        )
        if isinstance(answer, CacheError):
            assert isinstance(answer, PoolExhausted)
            assert before.pinned + whole > before.max_pinned, f"{answer}; {before}"
            return
        assert answer.num_blocks == whole
        assert answer.num_tokens == whole * size
        assert 0 <= answer.num_leased <= whole
        assert 0 <= answer.num_new <= whole
        after = world.snapshot()
        assert after.pinned == before.pinned + answer.num_new
        assert answer.pinned == after.pinned - self.pinned_by_others(namespace)
        assert (after.free, after.indexed, after.evictable) == (
            before.free,
            before.indexed,
            before.evictable,
        )
        if whole:
            world.pins.append(PinView(namespace, tokens[: whole * size], world.now + ttl_s))
            world.count("pinned")

    def unpin(self) -> None:
        world = self.world
        everything = self.chance(30)
        namespace = self.choose(world.namespaces)
        tokens: Tokens = ()
        if not everything and world.pins:
            pin = self.choose(world.pins)
            namespace, tokens = pin.namespace, pin.tokens
        before = world.snapshot()
        line = f"cache.unpin({namespace!r}, pack({list(tokens)}))"
        answer = self.call(line, lambda: world.cache.unpin(namespace, pack(tokens)))
        assert not isinstance(answer, CacheError)
        after = world.snapshot()
        assert after.pinned == before.pinned - answer.num_blocks
        assert answer.pinned == after.pinned - self.pinned_by_others(namespace)
        assert 0 <= answer.num_leased <= answer.num_blocks
        if not tokens:
            assert not any(pin.namespace == namespace for pin in world.snapshot().pins)
        self.forget_pins(lambda one: one.namespace == namespace and tokens in ((), one.tokens))

    def pinned_by_others(self, namespace: Namespace) -> int:
        """Ask for what other tenants have pinned: by ending a pin of theirs that is none."""
        return sum(
            self.world.cache.unpin(one, pack([NEVER_SENT])).pinned
            for one in self.world.namespaces
            if one.tenant != namespace.tenant
        )

    def forget_pins(self, gone: Callable[[PinView], bool]) -> None:
        self.world.pins = [one for one in self.world.pins if not gone(one)]

    def quota(self) -> None:
        world = self.world
        if not self.chance(30):
            return
        namespace = self.choose(world.namespaces)
        scope: Namespace | str = namespace if self.chance(50) else namespace.tenant
        most = None if self.chance(50) else self.draw.below(world.shape.num_blocks + 1)
        share = self.draw.below(world.shape.num_blocks // 2) if self.chance(50) else 0
        others = sum(share for one, (_, share) in world.quotas.items() if one != scope)
        answer = self.call(
            f"cache.set_quota({scope!r}, max_held={most}, guaranteed={share}, now={world.now})",
            lambda: world.cache.set_quota(scope, max_held=most, guaranteed=share, now=world.now),
        )
        if isinstance(answer, CacheError):
            assert share + others > world.shape.num_blocks
            return
        assert (answer.max_held, answer.guaranteed) == (most, share)
        assert world.cache.quota(scope) == answer or world.tickets
        world.quotas.pop(scope, None)
        if most is not None or share:
            world.quotas[scope] = (most, share)
        world.count("limited")

    # ------------------------------------------------------------------ the end

    def drain(self) -> None:
        """Everybody leaves, one way or another; nothing is lost, and the pool is whole again."""
        world = self.world
        for scope in list(world.quotas):
            world.cache.set_quota(scope, max_held=None, guaranteed=0, now=world.now)
        world.quotas.clear()
        world.settle()
        while world.leases or world.tickets or world.zombies or world.workers:
            match self.draw.below(4):
                case 0:
                    self.release()
                case 1:
                    self.detach()
                case 2:
                    world.now += world.shape.ttl_s
                    self.expire()
                case _:
                    self.worker_gone()
            world.verify()
            if not world.leases:
                world.tickets and self.cancel()
                world.settle()
            if not (world.leases or world.tickets):
                for worker in sorted({*world.zombies, *world.workers}):
                    world.cache.worker_gone(worker, now=world.now)
                world.zombies.clear()
                world.workers.clear()
        world.verify()
        snapshot = world.snapshot()
        assert (snapshot.private, snapshot.quarantined, snapshot.waiting) == (0, 0, 0)
        assert snapshot.evictable == snapshot.indexed
        if not snapshot.pins:
            assert world.cache.next_deadline() is None
        everything = pack([9] * (world.shape.num_blocks * world.shape.block_size))
        last, space = WorkerId(-2), Namespace("last")
        world.cache.attach(last, space, now=world.now)
        grant = world.cache.acquire(last, space, everything, now=world.now)
        assert isinstance(grant, Grant)
        first = world.shape.first_block
        ids = range(first, first + world.shape.num_blocks)
        assert sorted(grant.block_table) == list(ids), "a block is lost"
        world.cache.worker_gone(last, now=world.now)
        world.cache.check()


WEIGHTS: dict[str, int] = {
    "attach": 6,
    "acquire": 30,
    "acquire_wrongly": 2,
    "commit": 26,
    "extend": 10,
    "fork": 7,
    "truncate": 9,
    "release": 12,
    "absolve": 5,
    "renew": 2,
    "let_time_pass": 5,
    "expire": 5,
    "detach": 3,
    "worker_gone": 3,
    "scribble": 4,
    "cancel": 2,
    "misuse": 4,
    "look": 10,
    "reset": 4,
    "pin": 5,
    "unpin": 2,
    "quota": 4,
}
"""How often each rule runs."""

NAMES = [name for name, weight in WEIGHTS.items() for _ in range(weight)]


def step(rules: Rules, name: str) -> None:
    """Run one rule, then compare everything."""
    getattr(rules, name)()
    rules.world.verify()
