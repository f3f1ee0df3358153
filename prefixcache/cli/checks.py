"""What `doctor` looks at: each look gives findings, in prose, with what to do.

| look | what it asks |
|---|---|
| versions | are client and service of one kind? |
| core | is what was compiled of the core what its sources say? |
| invariants | does every invariant hold? |
| sizes | is there a pool, is it used, is it large enough for what leases hold? |
| ledger | is anything reused, and what would have kept what was evicted? |
| partings | where do most requests leave the stored prompts? |
| workers | has one been lost, are its blocks in quarantine? |
| progress | has one requests that it computes not, takes not, or never commits? |
| clocks | does the service answer at once, do its clock and ours run alike? |
| memory | is there room in shared memory, does anything dead lie there? |
| tier | does what the pool evicts come back, as it was, and is there room for it? |
| remote | is what other machines have, too, stored in time, and what its names say? |
| disk | is what lay on disk below the pool found again? |
| state | is what outlives the service kept? |
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from prefixcache import __version__, core_build
from prefixcache.cli import memory, view
from prefixcache.cli.status import Status
from prefixcache.config import format_size
from prefixcache.outline import Outline
from prefixcache.pool import SHARED_MEMORY, PoolFile
from prefixcache.texts import many
from prefixcache.types import Checked

OK, NOTE, WRONG = "ok", "note", "wrong"

FEW_REQUESTS: Final = 20
"""Fewer requests say nothing about a cache."""
_SLOW_S: Final = 0.05
"""A service that needs longer for an answer is held up by something."""
_MUCH_EVICTED: Final = 0.01
_MANY_PARTED: Final = 0.1
_MUCH_LOST: Final = 0.5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    look: str
    level: str
    """`ok`, `note` (could be better), or `wrong` (somebody must do something)."""
    text: str
    """What is so, and what it means."""
    advice: str = ""
    """What to do; empty if nothing."""


@dataclass(frozen=True, slots=True)
class Times:
    """How long some answers took, and what both clocks showed between the first and the last."""

    answers_s: tuple[float, ...]
    ours_s: float
    theirs_s: float


def versions(now: Status) -> Iterator[Finding]:
    """Compare the client's version with the service's."""
    theirs = now.info.version
    core = f"the service's core is {now.info.core or 'pure Python'}"
    if theirs == __version__:
        yield Finding("versions", OK, f"Client and service are both {theirs}; {core}.")
        return
    yield Finding(
        "versions",
        WRONG if theirs.split(".")[:1] != __version__.split(".")[:1] else NOTE,
        f"The client is {__version__}, the service {theirs or 'older than any that says so'}: "
        "fields that one does not know are left out.",
        "Restart the service with the version that is installed; workers attach again.",
    )


def core(now: Status) -> Iterator[Finding]:
    """Compare what the service's core was compiled from with the sources beside it."""
    if now.info.core == core_build.STALE:
        yield Finding(
            "core",
            WRONG,
            f"The service's core is {core_build.STALE} than those beside it: it does not do what "
            "they say.",
            f"Where the service is installed: {core_build.ADVICE} Then restart it.",
        )


def invariants(checked: Checked) -> Iterator[Finding]:
    """Say how the check went."""
    if checked.failure:
        first, _, rest = checked.failure.partition("\n")
        yield Finding(
            "invariants",
            WRONG,
            f"An invariant of the index does not hold: {first}. Blocks may be lost, or worse.",
            "Stop using this service, and report this with the tree below.\n" + rest,
        )
        return
    walked = f"{many(checked.num_runs, 'run', 'were')} walked"
    if not checked.left_out:
        yield Finding("invariants", OK, f"Every invariant of the index holds ({walked}).")
        return
    yield Finding(
        "invariants",
        OK,
        f"What was checked of the index holds ({walked}). "
        f"Left out, so that others were served meanwhile: {'; '.join(checked.left_out)}.",
        "prefixcache doctor --deep leaves nothing out; everybody waits meanwhile.",
    )


def sizes(now: Status) -> Iterator[Finding]:
    """Look at the pool's size and what it is used for."""
    snapshot, pool = now.snapshot, now.pool
    if pool is None or not snapshot.num_blocks:
        yield Finding(
            "sizes",
            NOTE,
            "There is no pool yet: the service learns the layout from the first worker.",
            "Attach a worker, or start with --model or --layout to see the numbers at once.",
        )
        return
    total, tokens = snapshot.num_blocks, snapshot.num_blocks * snapshot.block_size
    size = format_size(total * now.block_bytes)
    text = f"The pool has {many(total, 'block')} of {snapshot.block_size} "
    text += f"({many(tokens, 'token')}, {size})"
    held = snapshot.num_blocks - snapshot.free - snapshot.evictable
    longest = max((lease.num_tokens for lease in snapshot.leases), default=0)
    if held > 0.9 * total:
        yield Finding(
            "sizes",
            WRONG,
            f"{text}, and {held / total:.0%} of it is held by "
            f"{many(snapshot.num_leases, 'lease')}: "
            f"hardly anything stays for what could be reused, and "
            f"{many(snapshot.waiting, 'request')} "
            "wait.",
            "Serve with more --memory, or let workers hold fewer requests at a time.",
        )
    elif longest * 4 > tokens:
        yield Finding(
            "sizes",
            NOTE,
            f"{text}, and one lease holds {many(longest, 'token')}, more than a quarter of it.",
            "Serve with more --memory if there are several of such length at a time.",
        )
    elif snapshot.free > 0.5 * total and snapshot.requests >= FEW_REQUESTS:
        yield Finding(
            "sizes",
            OK,
            f"{text}; {snapshot.free / total:.0%} of it was never needed or is free again. "
            "If that stays so, a smaller one would do.",
        )
    else:
        yield Finding("sizes", OK, f"{text}; leases hold {held / total:.0%} of it now.")
    if now.info.draining:
        yield Finding(
            "sizes", NOTE, "The service is draining: it gives no new leases.", "Start another one."
        )
    if snapshot.max_pinned and snapshot.pinned >= snapshot.max_pinned:
        yield Finding(
            "sizes",
            NOTE,
            f"{many(snapshot.pinned, 'block', 'are')} pinned, which is the cap: no more can be.",
            "Unpin what is not needed any more: prefixcache unpin.",
        )


def ledger(now: Status) -> Iterator[Finding]:
    """Look at what became of the prompt tokens."""
    snapshot, told = now.snapshot, now.snapshot.ledger
    if snapshot.requests < FEW_REQUESTS:
        yield Finding(
            "ledger",
            OK,
            f"{many(snapshot.requests, 'request')} so far: too few to say anything about reuse.",
        )
        return
    reused = f"{told.hit_rate:.1%} of {told.total - told.resumed:,} prompt tokens were reused"
    if not told.reused:
        salted = sum(bool(one.salt) for one in snapshot.namespaces)
        why, advice = "no prompt began like an earlier one", "prefixcache explain says of one why."
        if len(snapshot.namespaces) * 2 > snapshot.requests:
            why = f"there are {many(len(snapshot.namespaces), 'namespace')}, which share nothing"
            advice = "Attach to one model, adapter, tenant and salt for all that may share"
            advice += " (every request has its own salt now?)." if salted else "."
        yield Finding(
            "ledger",
            WRONG,
            f"Nothing is ever reused in {many(snapshot.requests, 'request')}: {why}.",
            advice,
        )
        return
    missed = told.total - told.reused
    if told.evicted > _MUCH_EVICTED * told.total:
        more = memory.lines(snapshot.shortage, told.evicted, now)
        yield Finding(
            "ledger",
            NOTE,
            f"{reused}; {told.evicted / told.total:.1%} were stored once and evicted too early.",
            "\n".join(more) or "Serve with more --memory, or another --policy.",
        )
    elif now.partial != "tails" and told.granularity > snapshot.requests + 0.02 * told.total:
        yield Finding(
            "ledger",
            NOTE,
            f"{reused}; {told.granularity / told.total:.1%} are stored, but --partial "
            f"{now.partial} does not share them.",
            "Serve with --partial tails.",
        )
    else:
        cold = f"{told.cold / missed:.0%} of the others had never been seen" if missed else ""
        yield Finding("ledger", OK, f"{reused}{'; ' + cold if cold else ''}.")


def partings(now: Status, outline: Outline | None) -> Iterator[Finding]:
    """Name the place at which most requests of the last hour left the stored prompts."""
    if outline is None or now.snapshot.requests < FEW_REQUESTS:
        return
    found = [
        (branch.num_parted, branch.parted_at, part.namespace)
        for part in outline.namespaces
        for branch in part.branches
        if branch.num_parted and branch.depth
    ]
    if not found:
        return
    count, at, namespace = max(found, key=lambda one: one[0])
    if count < max(FEW_REQUESTS, _MANY_PARTED * now.snapshot.requests):
        return
    yield Finding(
        "partings",
        NOTE,
        f"{many(count, 'request')} of the last hour leave what is stored at token {at:,}, in "
        f"{view.show_namespace(namespace)}. That is fine where the system prompt ends; if "
        "something that always differs (a date, a name) stands there, it costs all that follows.",
        "Look at one of them: prefixcache explain REQUEST_ID.",
    )


def progress(now: Status, stalled_after_s: float) -> Iterator[Finding]:
    """Look for workers that live and get nowhere: no step, nothing taken, nothing committed."""
    for one in now.workers:
        if one.state != "attached":
            continue
        name = f"Worker {one.worker} (pid {one.pid})"
        stuck = [
            text
            for num, seconds, text in (
                (one.in_hand, one.stalled_s, "in hand and made no step"),
                (one.untaken, one.oldest_untaken_s, "before it and took the oldest of them not"),
            )
            for text in [f"has {many(num, 'request')} {text} for {seconds:,.1f} s"]
            if num and seconds > stalled_after_s
        ]
        if stuck:
            yield Finding(
                "progress",
                WRONG,
                f"{name} {' and '.join(stuck)}: it lives, but is stuck.",
                "See whether somebody reads its output, and where its threads stand; else end its "
                "process: its blocks come back at once.",
            )
        elif one.uncommitted_s > stalled_after_s:
            yield Finding(
                "progress",
                NOTE,
                f"{name} holds {many(one.leases, 'lease')} with tokens to compute, and has "
                f"committed nothing for {one.uncommitted_s:,.1f} s.",
                "If it does not compute, it keeps blocks from others: release those leases.",
            )


def workers(now: Status) -> Iterator[Finding]:
    """Look for workers that were lost."""
    snapshot = now.snapshot
    lost = [one for one in now.workers if one.state == "lost"]
    attached = [one for one in now.workers if one.state == "attached"]
    names = ", ".join(f"{one.worker} (pid {one.pid})" for one in lost) or "one that has gone"
    if snapshot.quarantined:
        yield Finding(
            "workers",
            WRONG,
            f"{many(snapshot.quarantined, 'block', 'are')} in quarantine because of {names}: it "
            f"went silent "
            "and may still be writing to them.",
            "End its process: the blocks come back at once. Else they do after --quarantine.",
        )
    elif lost:
        yield Finding(
            "workers",
            NOTE,
            f"{names} went silent, and holds no block: nobody misses anything.",
            "If its process hangs, end it.",
        )
    died = [one for one in now.workers if one.state == "died" and one.since_s < 600]
    text = f"{many(len(attached), 'worker', 'are')} attached"
    if died:
        names = ", ".join(one.worker for one in died[:5])
        more = f" and {len(died) - 5:,} more" if len(died) > 5 else ""
        text += f"; in the last ten minutes {names}{more} ended without saying so"
        yield Finding(
            "workers", NOTE, f"{text}. Their blocks came back.", "Look into their logs for why."
        )
    elif not lost:
        yield Finding("workers", OK, f"{text}; none was lost.")


def clocks(times: Times) -> Iterator[Finding]:
    """Look at how fast the service answers, and whether its clock and ours run alike."""
    typical, longest = statistics.median(times.answers_s), max(times.answers_s)
    took = f"The service answers in {typical * 1e3:.1f} ms (at most {longest * 1e3:.1f} ms)"
    if typical > _SLOW_S:
        yield Finding(
            "clocks",
            NOTE,
            f"{took}: it, or this machine, is busy.",
            "Keep workers x threads at or below the number of cores, less one for the service.",
        )
    else:
        yield Finding("clocks", OK, f"{took}.")
    drift = abs(times.theirs_s - times.ours_s)
    if drift > 0.1 + 2 * longest:
        yield Finding(
            "clocks",
            WRONG,
            f"In {times.ours_s:.1f} s of ours, the service's clock went on by "
            f"{times.theirs_s:.1f} s: one of both was stopped, or its clock is not right. Leases "
            "may end before their workers know.",
            "Do not suspend the service or its machine; give it its own processor time.",
        )


def shared_memory(now: Status) -> Iterator[Finding]:
    """Look at the pool's file, the room around it, and what the dead have left there."""
    pool = now.pool
    if stale := PoolFile.stale():
        size = sum(path.stat().st_blocks * 512 for path in stale if path.exists())
        yield Finding(
            "memory",
            NOTE,
            f"{many(len(stale), 'pool file')} of services that are gone take {format_size(size)} "
            f"of "
            f"{SHARED_MEMORY}: {', '.join(path.name for path in stale[:3])}.",
            "The next prefixcache serve removes them.",
        )
    if pool is None or pool.kind != "shm":
        return
    try:
        taken = os.stat(pool.name)  # noqa: PTH116 - one call, also for its blocks
        room = os.statvfs(os.path.dirname(pool.name))  # noqa: PTH120
    except OSError as error:
        yield Finding(
            "memory",
            WRONG,
            f"The pool's file {pool.name} cannot be seen from here: {error.strerror}. Workers of "
            "this host or container cannot map it.",
            "Run workers where the service runs, with the same /dev/shm.",
        )
        return
    free, missing = room.f_bavail * room.f_frsize, pool.num_bytes - taken.st_blocks * 512
    if missing > free:
        yield Finding(
            "memory",
            WRONG,
            f"The pool may still grow by {format_size(missing)}, and only {format_size(free)} are "
            "free there: a worker that writes beyond it is killed (SIGBUS).",
            f"Make {os.path.dirname(pool.name)} larger, or serve with less --memory.",  # noqa: PTH120
        )
    else:
        yield Finding(
            "memory",
            OK,
            f"{format_size(free)} are free beside the pool, which takes "
            f"{format_size(taken.st_blocks * 512)} of its {format_size(pool.num_bytes)} so far.",
        )
    if taken.st_mode & 0o077:
        yield Finding(
            "memory",
            WRONG,
            f"{pool.name} can be opened by others (mode {taken.st_mode & 0o777:o}): they can read "
            "every prompt's keys and values.",
            f"chmod 600 {pool.name}",
        )


def failures(now: Status) -> Iterator[Finding]:
    """Look for parts that have ended while the service goes on."""
    for part, cause in sorted(now.info.failures.items()):
        yield Finding(
            "service",
            WRONG,
            f"{part.capitalize()} failed, the service goes on without: {cause}.",
            "See the service's log; a restart begins it again.",
        )


def tier(now: Status) -> Iterator[Finding]:
    """Look at what lies below the pool."""
    snapshot = now.snapshot
    if not snapshot.host_blocks and not snapshot.disk_blocks:
        return
    lost = snapshot.evicted - snapshot.sunk - snapshot.leaving
    if snapshot.spoilt:
        yield Finding(
            "tier",
            WRONG,
            f"{many(snapshot.spoilt, 'block')} below the pool did not hold what was written there: "
            "they were computed again, and nobody has read them.",
            "Memory or a disk that changes by itself is damaged, or somebody else writes to it: "
            "look at the machine's log, and at who may run as this user.",
        )
    elif snapshot.evicted and lost > _MUCH_LOST * snapshot.evicted:
        yield Finding(
            "tier",
            NOTE,
            f"{lost / snapshot.evicted:.0%} of {many(snapshot.evicted, 'evicted block')} did not "
            "go below the pool: room was needed sooner than they could be copied, or they were "
            "partly filled.",
            "A larger pool (--memory) gives more time; a limit on what is written to a disk "
            "(--disk-write) takes some.",
        )
    else:
        yield Finding(
            "tier",
            OK,
            f"{many(snapshot.sunk, 'block')} went below the pool, "
            f"{many(snapshot.restored, 'block')} came back.",
        )


def remote(now: Status) -> Iterator[Finding]:
    """Look at what goes to a store that other machines have, too, and what comes from there."""
    snapshot = now.snapshot
    stored, lost = snapshot.remote_stored, snapshot.remote_unstored
    if not snapshot.has_remote:
        return
    if snapshot.remote_wrong:
        yield Finding(
            "remote",
            WRONG,
            f"{many(snapshot.remote_wrong, 'block')} of the remote store did not hold what their "
            "names say: they were removed and computed again, and nobody has read them.",
            "Somebody else writes to that store, or it is damaged: look at who may, and give "
            "--remote-secret on all machines.",
        )
    elif lost > _MUCH_LOST * (stored + lost):
        yield Finding(
            "remote",
            NOTE,
            f"{many(lost, 'block')} could not be stored for other machines: the remote store is "
            f"too slow, or fails; {many(stored, 'block')} could.",
            "They are computed there. Look at how much that store takes, and how fast.",
        )
    else:
        yield Finding(
            "remote",
            OK,
            f"{many(stored, 'block')} stored for other machines, "
            f"{many(snapshot.remote_restored, 'block')} fetched from there.",
        )


def disk(now: Status) -> Iterator[Finding]:
    """Look at what a disk below the pool keeps from one start to the next."""
    if not now.info.HasField("disk"):
        return
    kept = now.info.disk
    if kept.cold:
        yield Finding(
            "disk",
            NOTE,
            f"What lay below the pool in {kept.folder} is not found again: {kept.cold}.",
            "Nothing need be done: what is asked for is computed, and goes there again.",
        )
    elif kept.damaged_slots:
        yield Finding(
            "disk",
            WRONG,
            f"Beside {many(kept.damaged_slots, 'slot')} in {kept.folder} stood something else than "
            f"was written there; {many(kept.found_blocks, 'other block', 'were')} found again.",
            "A machine that ends while it writes may leave a few. If there are more at each start, "
            "the disk is damaged, or somebody else writes to that folder.",
        )
    else:
        yield Finding(
            "disk",
            OK,
            f"{many(kept.found_blocks, 'block', 'were')} found again in {kept.folder}.",
        )


def state(now: Status) -> Iterator[Finding]:
    """Look at what outlives the service."""
    if not now.info.HasField("state"):
        return
    kept = now.info.state
    if kept.failure:
        yield Finding(
            "state",
            WRONG,
            f"Nothing is kept in {kept.folder} any more: {kept.failure}.",
            "Make room or repair the disk, and restart; until then a restart begins empty.",
        )
    elif kept.dropped_runs or kept.damaged_blocks:
        yield Finding(
            "state",
            NOTE,
            f"{many(kept.dropped_runs, 'run', 'were')} not kept because the disk was too slow, and "
            f"{many(kept.damaged_blocks, 'block', 'were')} damaged at the last start (they are "
            f"not used).",
            "Use a faster disk for --state.",
        )
    else:
        yield Finding(
            "state",
            OK,
            f"{kept.folder} holds what a restart needs; the last start took "
            f"{many(kept.restored_tokens, 'token')} over.",
        )
