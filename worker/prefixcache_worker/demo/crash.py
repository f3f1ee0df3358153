"""The crash: a worker is killed in the middle of a prefill for which another worker waits.

```
victim     ├─ prefill of a cold, long system prompt ── chunk ── chunk ──✗ SIGKILL
successor        ├─ same system prompt: waits ─────────────────────────┤ takes over at its end
others     ├─ answers ── answers ── answers ── answers ── answers ── answers ── answers
service                                       its leases end, its private blocks are free ─┘
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from prefixcache.texts import many
from prefixcache.types import LeaseInfo, Snapshot
from prefixcache_worker.demo.dispatcher import Dispatcher, Interrupted
from prefixcache_worker.demo.failure import CrashMissed
from prefixcache_worker.demo.record import Attempt, Death, Request
from prefixcache_worker.demo.watch import Watch

MOMENT_S: Final = 300.0
"""How long to wait for the moment: guards against hanging only."""
SLACK_S: Final = 0.02
"""By how much the moment of a grant may be misjudged."""
RETURN_S: Final = 300.0
"""How long the dead worker's leases may take to end.  A killed process is dead when each of its
threads has run once more, and the service waits for that: where others take the whole machine and
it is a nice one, minutes."""


class Killable(Protocol):
    """The part of a worker process that a crash needs."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def kill(self) -> None:
        """Send SIGKILL."""


async def crash(
    dispatcher: Dispatcher,
    watch: Watch,
    victim: Killable,
    *,
    victim_name: str,
    worker_id: str,
    successor_name: str,
    first: Request,
    second: Request,
    ask: Callable[[Request, str], asyncio.Task[Request]],
) -> Death:
    """Kill `victim` while it computes `first` and its successor waits for its prefix.

    Both requests are answered in the end, by others.  Returns as soon as the service has taken back
    what the victim held.  A model that computes the whole prompt before it is seen computing it (a
    toy, on a fast machine) is killed all the same, and the answer says so.

    Args:
        dispatcher: hands out the requests.
        watch: looks at the service.
        victim: the process that dies.
        victim_name: its name with the dispatcher.
        worker_id: its name in snapshots.
        successor_name: the worker that waits.
        first: a request with a long, cold system prompt.
        second: another one with the same system prompt.
        ask: starts a request on a worker.

    Raises:
        CrashMissed: nothing happened in time, or leases of the dead are left.
    """
    block_size = (await watch.look()).block_size
    # The successor is kept free, so that the time to the takeover is that of the service, and not
    # that of a step which the successor happened to be in.
    dispatcher.reserved = successor_name
    await dispatcher.until(lambda: dispatcher.load(successor_name) == 0)
    async with watch.keen():
        ask(first, victim_name)
        await dispatcher.until(lambda: first.granted_s is not None)
        ask(second, successor_name)
        before = await watch.until(
            lambda seen: _is_moment(seen, worker_id, first) or first.first_s is not None, MOMENT_S
        )
        if before is None:
            raise CrashMissed(f"{first.id} was neither seen in mid-prefill nor answered")
        in_prefill = first.first_s is None
        at_s = dispatcher.clock()
        victim.kill()
        after = await watch.until(lambda seen: _is_cleared(seen, worker_id), RETURN_S)
        if after is None:
            raise CrashMissed(
                f"{victim_name} was killed, but what it held has not come back: "
                f"{_told_left(watch.latest, worker_id)}"
            )
        returned_ms = (watch.at_s - at_s) * 1e3
        held = _leases(before, worker_id)
        dispatcher.worker_died(victim_name, at_s)
        await dispatcher.until(lambda: second.granted_s is not None)
    dispatcher.reserved = None
    assert second.granted_s is not None
    # The successor's waiting time does not contain the way of the request to it: a few ms.
    granted_s = max(second.granted_s, at_s) if second.granted_s > at_s - SLACK_S else 0.0
    second.took_over = in_prefill and granted_s >= at_s
    return Death(
        worker=victim_name,
        pid=victim.pid,
        at_s=at_s,
        in_prefill=in_prefill,
        leases=len(held),
        blocks_returned=sum(_private(lease, block_size) for lease in held),
        blocks_kept=sum(lease.num_blocks - _private(lease, block_size) for lease in held),
        returned_ms=returned_ms,
        takeover_ms=(granted_s - at_s) * 1e3 if second.took_over else None,
        takeover_worker=second.worker,
        takeover_request=second.id,
    )


def attempts(
    interrupted: Sequence[Interrupted], successor: Request, *, chunk: int, block_size: int
) -> tuple[Attempt, ...]:
    """Say what of each interrupted request's work is kept and what died, once all are answered.

    The request that was sent again knows: what it found beyond what the first attempt had found,
    that attempt had left behind.  For the one that died in mid-prefill it is the successor who
    knows, because it has computed the rest meanwhile.

    Args:
        interrupted: the requests that died with their worker.
        successor: the request that took over.
        chunk: prompt tokens that a worker computes at a time.
        block_size: tokens of a block; a part of a block that died with its writer is not reused.
    """
    return tuple(_attempt(t, successor, chunk + block_size) for t in interrupted)


def _attempt(interrupted: Interrupted, successor: Request, most_lost: int) -> Attempt:
    request = interrupted.request
    num_prompt = len(request.prompt)
    in_prefill = interrupted.started and not interrupted.num_answered
    witness = successor if in_prefill and request.assistant == successor.assistant else request
    kept = max(witness.ledger.reused - interrupted.num_reused, 0) if interrupted.started else 0
    rest = num_prompt - interrupted.num_reused - kept if interrupted.started else 0
    return Attempt(
        request=request.id,
        worker=interrupted.worker,
        sent_s=interrupted.sent_s,
        died_s=interrupted.died_s,
        num_prompt=num_prompt,
        num_kept=kept,
        num_lost=min(rest, most_lost) if in_prefill else rest,
        num_answered=interrupted.num_answered,
    )


def _is_moment(seen: Snapshot, worker_id: str, first: Request) -> bool:
    """Whether `first` has committed a chunk of its own, more are to come, and somebody waits."""
    lease = _lease_of(_leases(seen, worker_id), len(first.prompt))
    if lease is None or not seen.waiting:
        return False
    return first.ledger.reused < lease.num_committed < len(first.prompt)


def _is_cleared(seen: Snapshot, worker_id: str) -> bool:
    """Whether nothing is left of the dead: no lease, and no block that it might still write to."""
    return not _leases(seen, worker_id) and seen.quarantined == 0


def _told_left(seen: Snapshot | None, worker_id: str) -> str:
    """Say what is there.

    >>> _told_left(None, "w1")
    'the service was not seen'
    """
    if seen is None:
        return "the service was not seen"
    left = many(len(_leases(seen, worker_id)), "lease")
    return f"{left}, {many(seen.quarantined, 'block')} in quarantine"


def _leases(seen: Snapshot, worker_id: str) -> list[LeaseInfo]:
    return [lease for lease in seen.leases if lease.worker == worker_id]


def _lease_of(leases: Sequence[LeaseInfo], num_prompt: int) -> LeaseInfo | None:
    return next((lease for lease in leases if lease.num_tokens == num_prompt), None)


def _private(lease: LeaseInfo, block_size: int) -> int:
    """Blocks of a lease that nobody else can use: those after its last committed token."""
    return lease.num_blocks - -(-lease.num_committed // block_size)
