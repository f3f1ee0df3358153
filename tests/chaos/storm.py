"""A storm: a real service and real workers, while everything that can go wrong does.

```
4 actors ── directly ──────────► prefixcache serve --state DIR ── a disk of its own, at times full
4 actors ── proxy ─┘ drops,      --identities: two tenants that are honest, one that is not
2 adversaries ──── half-opens    quotas, HTTP
2 viewers ── as actors, reading through contiguous views
2 clerks ── lines, every other one odd ──► 2 real worker processes with a tiny model
8 returners ── to chats that lie below the pool: --host, --disk on another small disk, --remote
               liar ──► a Valkey server: objects of others, changed, cut short, late, or never
every round: the service is killed and started again, on what lies on both disks, or on a new one
below the pool, with what the store has; workers are killed and stopped, and what lies below is
changed, its porter killed and stopped, its disk full; the store is killed and begins with nothing,
is stopped, altered, and said to hold what it does not
every fourth: nothing but the adversaries, and what lies below
```
Ends with a verdict: no wrong byte was read, the history is that of a cache, nobody's session was
ended by another, nobody waited for long, each line of a worker process was answered as alone, and
nothing is left.

    PYTHONPATH=tests python -m chaos.storm [--rounds 100] [--seconds-per-round 8] [--seed N]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise, product, takewhile
from pathlib import Path
from random import Random
from typing import Any

import psutil

import prefixcache
from certificate_file import write
from chaos.history import check, read
from chaos.liar import Liar
from chaos.pattern import Pool
from chaos.proxy import Proxy
from chaos.spoiler import (
    BLOCK_BYTES,
    HEAD,
    ONE_IN,
    files_in_memory,
    spoil_disk,
    spoil_memory,
    spoil_objects,
)
from chaos.universe import (
    BLOCK_SIZE,
    BOSS,
    HONEST,
    LAYOUT,
    LONG_MODEL,
    LONG_SYSTEMS,
    MODELS,
    NUM_CHATS,
    NUM_LONG,
    NUM_SYSTEMS,
    RED,
    RETURNERS,
    TOKENS,
    identities,
    space,
    tokens_of,
)
from prefixcache.client import Client
from prefixcache.errors import CacheError
from prefixcache.pool import map_pool
from prefixcache.service.tiers.disk import KEPT
from prefixcache.types import Namespace, Snapshot
from prefixcache_bench.reports.figures import publish
from service.below import carriers, porters
from service.service_process import ServiceProcess, environment, sizes
from service.valkey_server import ValkeyServer, binary

NUM_BLOCKS = 1536
TTL_S = 1.0
ACTORS = 8
VIEWERS = 2
"""Of the actors, by numbers from the last one on: those read through views of their leases."""
ADVERSARIES = 2
RED_BLOCKS = 256
"""What the adversaries' tenant may hold."""
DISK_BYTES = 24 * 2**20
NUM_HOST, NUM_DISK = 512, 8192
"""Blocks that fit below the pool, in memory and on a disk."""
SLOT_BYTES = BLOCK_BYTES + HEAD.itemsize
TIER_DISK_BYTES = NUM_DISK * SLOT_BYTES + 3 * 2**20
STORE_BYTES = 64 * 2**20
"""What the store holds: the oldest objects go."""
MORE_CHILDREN = 4
"""Processes that a service may have beyond those it began with: porters and carriers, of each one
at work, and one that has been killed."""
MOST_FILES_OF_A_PORTER = 24
"""Of a carrier as well."""
EXTRA_S = 0.05
"""Who waits for what lies below waits twice as long as was predicted, and so much more."""
BESIDE_S = 0.5
"""So long before and after a wait, look-ups tell how slow the machine is just then."""
CHECKED_AT_ONCE = 100_000
LEAST_ALTERED = 4
"""How often what lies below was changed before some of that must have been asked for again."""
LEAST_LIES = 50
"""Objects of which a byte was changed on their way before that must have been noticed."""
MOOD_S = 1.0
"""How long a store lies, is slow, or hangs up."""
FINAL_WAIT_S = 60.0
LEAK_SHARE = 1.6
"""How much larger than after warming up the service may be at the end: what the adversaries did to
the last one and to the first is chance."""

LEAK_FILES = 16
"""Descriptors more than a service has that nobody has spoken to yet."""

PROBES = 50
"""Look-ups of each honest tenant that tell how long they take when nobody else is there."""

LONGEST_PROBE_S = 10.0
"""A look-up that takes longer, with no fault but the adversaries, was starved."""

CALM_AFTER_S = 3.0
"""Into a round without other faults, by when everybody is back."""

PATIENCE_S = (10.0, 2.0)
"""How long an actor waits for an answer, directly and through the proxy."""

LEAST_OPS_PER_S = 100
LEAST_RESTORED = 2000
"""Tokens that come back in a round, also on a crowded machine; on a quiet one many more do."""
MOST_LULL_S = 30.0
"""Longer than any fault lasts, with the start of a service after it on a crowded machine."""

PATIENCE_OF_CLERKS_S = 300.0
"""Until they have had their last answers, and their workers have ended by themselves."""

SETTLE_S = 2 * TTL_S + 8
"""Until leases and quarantine are gone: after a ttl each, on a crowded machine."""

LIMITS = (
    *("--max-workers", "128", "--max-namespaces", "128", "--max-leases", "8192"),
    *("--max-line", "128", "--max-watchers", "16", "--max-calls", "512"),
)
"""So low that the adversaries reach each of them; a part of each is kept for every tenant."""

GOING_S = 15.0
"""For what the service puts away a little at a time: descriptors, namespaces."""

MOST_RED_SPACES = 8
"""Namespaces of the adversaries in which something may be stored in the end."""

MNT_DETACH = 2
DOCUMENT = Path("docs/reliability.md")


@dataclass
class Report:
    """What a storm showed."""

    rounds: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    ops: int = 0
    read_tokens: int = 0
    wrong: int = 0
    viewed_tokens: int = 0
    """Of them and of those that were not certain, what was read through views."""
    ended_views: int = 0
    left_views: list[str] = field(default_factory=list)
    """What could be read where a view had ended."""
    commits: int = 0
    hits: int = 0
    resets: int = 0
    phantoms: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    restarts: int = 0
    restored_blocks: int = 0
    found_blocks: int = 0
    """On the disk below the pool, summed over all starts."""
    damaged_slots: int = 0
    settle_s: float = 0.0
    leaks: list[str] = field(default_factory=list)
    final_tokens: int = 0
    restored_tokens: int = 0
    """Of those that were verified, what had come back from below the pool."""
    returned: Counter[str] = field(default_factory=Counter)
    """Of who comes back to long chats: requests, tokens asked for, and what became of them."""
    least_restored: int = 0
    """Fewer tokens that came back show that something is lost on the way."""
    below: Counter[str] = field(default_factory=Counter)
    """Blocks that went below, came back, and so on, by the names of `Counts`."""
    has_store: bool = False
    lies: Counter[str] = field(default_factory=Counter)
    """What the store said that was not so, and how often."""
    waits: list[tuple[float, float, float]] = field(default_factory=list)
    """Of each wait for what lay below, while nothing but that failed, in seconds: how long it was,
    what had been predicted, and the longest look-up beside it, which is the machine's doing."""
    rss_growth: float = 1.0
    more_files: int = 0
    red_spaces: int = 0
    attempts: dict[str, dict[str, int]] = field(default_factory=dict)
    """What the adversaries did, by kind: how often, and how it was answered."""
    broken: list[str] = field(default_factory=list)
    """Answers to them that no request may get."""
    lines: Counter[str] = field(default_factory=Counter)
    """What the worker processes did: lines answered and refused, processes started and killed."""
    misanswered: list[str] = field(default_factory=list)
    """Lines of theirs that were answered otherwise than alone, or not at all."""
    cancelled: int = 0
    moved: int = 0
    """Requests that were granted segments."""
    calm_s: float = 0.0
    ended_sessions: list[str] = field(default_factory=list)
    """Sessions of the honest that ended while nothing went wrong but the adversaries."""
    idle_s: list[float] = field(default_factory=list)
    """How long look-ups took with nobody else there, and then beside the adversaries."""
    beside_s: list[float] = field(default_factory=list)
    longest_lull_s: float = 0.0
    """No operation of any worker was answered for so long."""
    least_per_s: int = 0
    """Operations below which it was no storm."""

    @property
    def failures(self) -> list[str]:
        """What must not be; empty if all is well."""
        failed = list(self.leaks)
        if self.wrong:
            failed.append(f"{self.wrong} tokens read wrong")
        failed += [f"a hit that nobody committed: {one}" for one in self.phantoms]
        failed += [f"a commit that was not found: {one}" for one in self.forgotten]
        failed += [f"a view of an ended lease: {one}" for one in self.left_views]
        if not self.ended_views:
            failed.append("no view has ended")
        failed += [f"an answer to an adversary: {one}" for one in self.broken]
        failed += [f"a line to a worker: {one}" for one in self.misanswered]
        if self.restarts and not self.found_blocks:
            failed.append("nothing was found again on the disk below the pool")
        if not self.restored_tokens:
            failed.append("nothing came back from below the pool")
        elif self.restored_tokens < self.least_restored:
            failed.append(
                f"{self.restored_tokens:,} tokens came back from below the pool, of at least "
                f"{self.least_restored:,}"
            )
        if not self.below["spoilt"] and self.faults["alter slots"] > LEAST_ALTERED:
            failed.append("of what was changed below the pool nothing was noticed")
        if self.has_store and not self.below["remote_restored"]:
            failed.append("nothing came back from the store")
        if self.lies["flipped"] > LEAST_LIES and not self.below["remote_wrong"]:
            failed.append("of what the store lied nothing was noticed")
        if (longest := max((took for took, _, _ in self.waits), default=0.0)) > MOST_LULL_S:
            failed.append(f"a wait for what lay below the pool took {longest:.0f} s")
        if not self.lines["answered"] or not self.lines["refused"]:
            failed.append("the workers answered no line")
        failed += [f"a session ended: {one}" for one in self.ended_sessions]
        if max(self.beside_s, default=0.0) > LONGEST_PROBE_S:
            failed.append(f"a look-up took {max(self.beside_s):.1f} s")
        if self.settle_s > SETTLE_S:
            failed.append(f"leases and quarantine took {self.settle_s:.1f} s to go back to 0")
        if self.longest_lull_s > MOST_LULL_S:
            failed.append(f"nothing was answered for {self.longest_lull_s:.0f} s")
        if self.ops < self.least_per_s * self.seconds:
            failed.append(f"fewer than {self.least_per_s} operations a second: no storm")
        return failed

    def shown(self) -> list[str]:
        """Write it for people."""
        faults = ", ".join(f"{count} x {name}" for name, count in sorted(self.faults.items()))
        return [
            f"rounds     {self.rounds} in {self.seconds:.0f} s: {faults}",
            *self._red(),
            f"load       {self.ops:,} operations, {self.ops / self.seconds:.0f} a second, by "
            f"{ACTORS} processes; at most {self.longest_lull_s:.1f} s without an answer",
            f"reads      {self.read_tokens + self.final_tokens:,} tokens verified byte by byte, "
            f"{self.wrong} wrong",
            *self._below(),
            f"views      {self.viewed_tokens:,} tokens read through views of leases; "
            f"{self.ended_views:,} ended, of which {len(self.left_views)} showed anything",
            f"segments   {self.moved:,} prompts with tokens of other places beside them",
            f"history    {self.hits:,} hits, {self.commits:,} commits, {self.resets} resets: "
            f"{len(self.phantoms)} hits unexplained, {len(self.forgotten)} commits not found",
            f"workers    {self.lines['answered']:,} honest lines answered as alone, "
            f"{self.lines['refused']:,} odd ones refused each by itself, {len(self.misanswered)} "
            f"otherwise; {self.lines['workers']} processes, {self.lines['killed']} killed",
            f"restarts   {self.restarts}: {self.restored_blocks:,} blocks of the pool restored in "
            f"all, {self.found_blocks:,} found again on the disk below it; beside "
            f"{self.damaged_slots:,} stood what was not whole",
            f"settled    leases and quarantine back at 0 after {self.settle_s:.2f} s "
            f"(limit {SETTLE_S:g} s)",
            f"leaks      {len(self.leaks)}; service's memory {self.rss_growth:.2f} of its first, "
            f"{self.more_files:+d} descriptors, {self.red_spaces} namespaces of the adversaries",
            "PASSED" if not self.failures else "FAILED: " + "; ".join(self.failures[:5]),
        ]

    def _below(self) -> list[str]:
        below = self.below
        late = [(took - 2 * predicted - EXTRA_S, looked) for took, predicted, looked in self.waits]
        past = [by for by, _ in late if by > 0]
        unexplained = [by - looked for by, looked in late if by > looked]
        each = {"host": below["restored"] - below["disk_restored"] - below["remote_restored"]}
        each |= {name: below[f"{name}_restored"] for name in ("disk", "remote")}
        tiers = ", ".join(f"{BLOCK_SIZE * num:,} from {name}" for name, num in each.items())
        told = self.returned
        kinds = ("hit", "joined", "restored")
        shares = {name: told[name] / max(1, told["tokens"]) for name in kinds}
        return [
            f"restored   {self.restored_tokens:,} of these tokens had come back from below, of "
            f"{BLOCK_SIZE * below['restored']:,} that were copied back: {tiers}",
            f"returners  {told['requests']:,} requests: of their tokens {shares['hit']:.0%} lay in "
            f"the pool, {shares['restored']:.0%} came back, {shares['joined']:.0%} others had "
            f"computed meanwhile; not brought back, since computing was quicker: "
            f"{below['declined_slow']:,} times, since much was on its way: "
            f"{below['declined_busy']:,}, for want of room: {below['declined_room']:,}",
            f"below      {below['evicted']:,} blocks evicted, {below['sunk']:,} of them copied "
            f"down, {below['disk_written']:,} to the disk; {below['restored']:,} copied back, "
            f"{below['disk_restored']:,} of them from the disk; {below['spoilt']:,} were not what "
            "they had been, and read by nobody",
            *self._store(),
            f"waits      {len(self.waits):,} for what lay below, while nothing else failed: "
            f"{_quantiles([took for took, _, _ in self.waits])}; {len(past)} past twice what was "
            f"predicted and {1e3 * EXTRA_S:g} ms, by at most {1e3 * max(past, default=0):.0f} ms; "
            f"{len(unexplained)} by more than a look-up took beside them, by at most "
            f"{1e3 * max(unexplained, default=0):.0f} ms",
        ]

    def _store(self) -> list[str]:
        if not self.has_store:
            return ["store      none: no Valkey server is installed"]
        below = self.below
        lies = ", ".join(
            f"{count:,} {name}" for name, count in sorted(self.lies.items()) if name != "answers"
        )
        return [
            f"store      {below['remote_stored']:,} blocks stored for other machines, "
            f"{below['remote_restored']:,} copied back; {self.lies['answers']:,} answers, of which "
            f"{lies}; {below['remote_wrong']:,} objects were not what they should have been, and "
            f"read by nobody; {below['remote_late']:,} questions not answered in time"
        ]

    def _red(self) -> list[str]:
        total: Counter[str] = Counter()
        for answers in self.attempts.values():
            total.update(answers)
        lines = [
            f"adversary  {total['done']:,} attempts of {len(self.attempts)} kinds: {total['ok']:,} "
            f"requests granted, {total['refused']:,} refused, {total['unanswered']:,} unanswered, "
            f"{total['broken']} answered as no request may be"
        ]
        for kind, answers in sorted(self.attempts.items()):
            told = ", ".join(f"{count:,} {name}" for name, count in sorted(answers.items()))
            lines.append(f"           {kind}: {told}")
        lines += [
            f"honest     {self.cancelled:,} calls cancelled; in {self.calm_s:.0f} s with nothing "
            f"but the adversaries {len(self.ended_sessions)} sessions ended",
            f"look-ups   {_quantiles(self.idle_s)} idle; {_quantiles(self.beside_s)} beside them",
        ]
        return lines


def _quantiles(times: list[float]) -> str:
    if not times:
        return "none"
    ordered = sorted(times)
    shown = (ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100], ordered[-1])
    return "p50 {:.1f}, p99 {:.1f}, max {:.0f} ms".format(*(1e3 * one for one in shown))


class Disk:
    """A small disk of its own, to be filled; without the right to mount, a limit on files."""

    def __init__(self, folder: Path, num_bytes: int = DISK_BYTES) -> None:
        self.folder = folder
        folder.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={num_bytes},mode=700", "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        )
        self.mounted = mounted.returncode == 0
        self._filler = folder / "filler"

    def fill(self, pid: int) -> str:
        if not self.mounted:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            return "file limit"
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(65536))
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(512))
        return "disk full"

    def free(self, pid: int) -> None:
        if self.mounted:
            self._filler.unlink(missing_ok=True)
        else:
            no_limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, no_limit)

    def close(self) -> None:
        if self.mounted:
            ctypes.CDLL(None).umount2(str(self.folder).encode(), MNT_DETACH)


class Storm:
    """One storm in a folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = Random(seed)
        self.report = Report()
        self.disk = Disk(folder / "disk")
        self.disk_below = Disk(folder / "below", TIER_DISK_BYTES)
        self.store: ValkeyServer | None = None
        self.liar: Liar | None = None
        if binary() is not None:
            self.store = ValkeyServer(folder, "--maxmemory", str(STORE_BYTES))
            self.liar = Liar(folder / "liar.sock", self.store.path, Random(seed + 1))
            self.report.has_store = True
            self.report.lies = self.liar.told
        self.target = f"unix:{folder}/service.sock"
        self.http = f"127.0.0.1:{free_port()}"
        self.identities = identities(folder / "identities.toml")
        self.certificates = folder / "certificates"
        self.certificates.mkdir()
        for model in MODELS:
            write(self.certificates, model, model=model, measured={"none": [(0.0, 0.0)] * 2})
        self.serial = 0
        self.former: Counter[str] = Counter()
        """What services that have ended said of what lies below."""
        self.porters: dict[int, psutil.Process] = {}
        """All that were seen, and all carriers."""
        self.files_below: set[Path] = set()
        """In shared memory, all that were seen."""
        self.told: list[dict[str, object]] = []
        """Events of the history that are our own doing."""
        self.service = self.serve()
        first = psutil.Process(self.service.process.pid)
        self.first_files, self.first_children = first.num_fds(), len(first.children(True))
        self.proxy = Proxy(folder / "proxy.sock", folder / "service.sock")
        self.actors: list[subprocess.Popen[bytes]] = []
        self.adversaries: list[subprocess.Popen[bytes]] = []
        self.clerks: list[subprocess.Popen[bytes]] = []
        self.returners: list[subprocess.Popen[bytes]] = []
        prepare(folder)
        self.cancellers = [self.start("canceller", self.target, tenant) for tenant in HONEST]
        self.calm: list[tuple[float, float]] = []
        self.first_rss = 0
        self.alone_until = 0.0
        self.ended_at = 0.0

    def serve(self) -> ServiceProcess:
        self.former = self.report.below
        service = ServiceProcess(
            self.target,
            *sizes(NUM_BLOCKS, BLOCK_SIZE, LAYOUT),
            *("--ttl", str(TTL_S), "--log-level", "warning", "--grace", "2"),
            *("--state", str(self.disk.folder / "state"), "--quarantine", str(TTL_S)),
            *("--identities", str(self.identities), "--http", self.http, *LIMITS),
            *("--segments", str(self.certificates)),
            *("--host", str(NUM_HOST * SLOT_BYTES)),
            *("--disk", f"{NUM_DISK * SLOT_BYTES}:{self.disk_below.folder / 'tier'}"),
            *(() if self.liar is None else ("--remote", self.liar.address)),
        )
        try:
            with self.connect() as client:
                client.set_quota(RED, max_held=RED_BLOCKS)
                info = client.call("snapshot", _snapshot()).service
                self.report.restored_blocks += info.state.restored_blocks
                self.report.found_blocks += info.disk.found_blocks
                self.report.damaged_slots += info.disk.damaged_slots
        except CacheError:
            service.close()
            raise
        return service

    def connect(self, tenant: str = BOSS) -> Client:
        """Connect as a tenant; a service that the adversaries keep busy may need several tries."""
        due = time.monotonic() + 30
        while True:
            client = prefixcache.connect(self.target, token=TOKENS[tenant], timeout_s=30.0)
            try:
                client.snapshot()
            except CacheError:
                client.close()
                if time.monotonic() > due:
                    raise
            except BaseException:
                client.close()
                raise
            else:
                return client

    def act(self, number: int) -> subprocess.Popen[bytes]:
        target = self.target if number % 2 else f"unix:{self.folder}/proxy.sock"
        patience_s = PATIENCE_S[0] if number % 2 else PATIENCE_S[1]
        kind = "viewer" if number >= ACTORS - VIEWERS else "actor"
        return self.start(kind, target, HONEST[number // 2 % 2], str(patience_s))

    def come_back(self, number: int) -> subprocess.Popen[bytes]:
        more = (HONEST[number % 2], str(PATIENCE_S[0]), str(LONG_SYSTEMS[number // 2]))
        return self.start("returner", self.target, *more)

    def start(self, kind: str, target: str, *more: str) -> subprocess.Popen[bytes]:
        self.serial += 1
        log = self.folder / f"{kind}-{self.serial}.log"
        arguments = [target, str(self.serial), str(log), *more]
        return subprocess.Popen(
            [sys.executable, "-m", f"chaos.{kind}", *arguments], env=environment()
        )

    # ------------------------------------------------------------------ what goes wrong

    def kill_service(self) -> None:
        self.service.signal(signal.SIGKILL)
        self.service.close()
        time.sleep(self.random.choice((0.0, 0.0, 0.2)))
        self.service = self.serve()
        self.report.restarts += 1

    def end_service(self) -> None:
        self.service.signal(signal.SIGTERM)
        self.service.wait()
        self.service.close()
        self.service = self.serve()
        self.report.restarts += 1

    def stop_service(self) -> None:
        self.service.signal(signal.SIGSTOP)
        time.sleep(self.random.choice((0.3, 0.8, TTL_S + 0.5)))
        self.service.signal(signal.SIGCONT)

    def kill_worker(self) -> None:
        number = self.random.randrange(ACTORS)
        self.actors[number].kill()
        self.actors[number].wait()
        self.actors[number] = self.act(number)

    def stop_workers(self) -> None:
        stopped = self.random.sample(self.actors, 3)
        for actor in stopped:
            actor.send_signal(signal.SIGSTOP)
        time.sleep(self.random.choice((0.2, TTL_S * 0.95, TTL_S + 0.4, TTL_S + 0.8)))
        for actor in stopped:
            actor.send_signal(signal.SIGCONT)

    def drop_connections(self) -> None:
        self.proxy.drop()

    def half_open_connections(self) -> None:
        self.proxy.mute()
        time.sleep(self.random.choice((0.3, TTL_S + 0.4)))
        self.proxy.speak()

    def fill_disk(self) -> None:
        self.disk.fill(self.service.process.pid)
        time.sleep(0.7)
        self.disk.free(self.service.process.pid)

    # ------------------------------------------------------------------ what goes wrong below

    def porter(self) -> int:
        """Give the process of a porter that is at work; 0: there is none just now."""
        with contextlib.suppress(OSError):
            for porter in porters(self.service):
                if files_in_memory(porter):
                    return porter
        return 0

    def hear_porter(self) -> None:
        """Wait until a porter is at work: on a crowded machine he takes long to start."""
        due = time.monotonic() + PATIENCE_OF_CLERKS_S
        while not self.porter():
            assert time.monotonic() < due, "nothing is heard of the porter"
            time.sleep(0.1)

    def signal_porter(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if porter := self.porter():
                os.kill(porter, number)

    def kill_porter(self) -> None:
        self.signal_porter(signal.SIGKILL)

    def stop_porter(self) -> None:
        self.signal_porter(signal.SIGSTOP)
        time.sleep(self.random.choice((0.2, 0.8, 2.0)))
        self.signal_porter(signal.SIGCONT)

    def alter_slots(self) -> None:
        """Change what lies below; a file in memory that is cut short kills who touches it."""
        kinds = ("flip", "flip", "swap", "swap", "cut")
        self.spoil(self.random.choice(kinds), self.random.choice((*kinds, "heads")))

    def spoil(self, memory: str, disk: str, one_in: int = ONE_IN) -> None:
        with contextlib.suppress(OSError, ValueError):  # there is no porter
            spoil_memory(self.porter(), self.random, memory, one_in)
        with contextlib.suppress(OSError):  # it is full
            spoil_disk(self.disk_below.folder / "tier", self.random, disk, one_in)

    def fill_disk_below(self) -> None:
        porter = self.porter()
        self.disk_below.fill(porter or self.service.process.pid)
        time.sleep(0.7)
        self.disk_below.free(porter or self.service.process.pid)

    def reset_with_hauls_out(self) -> None:
        """Wait for a chat that lies below, and reset its namespace while it comes back."""
        tenant, model = self.random.choice(HONEST), LONG_MODEL
        with contextlib.suppress(CacheError), self.connect(tenant) as client:
            session = client.attach(model, LAYOUT)
            for chat in range(NUM_LONG):
                whole = tokens_of(LONG_SYSTEMS[0], chat)
                if client.explain(Namespace(model), whole).num_below:
                    break
            asked = session.acquire_later(whole, wait_s=FINAL_WAIT_S)
            event = {"op": f"storm.{len(self.told)}", "t": time.monotonic()}
            self.told.append(event | {"kind": "reset", "model": space(tenant, model)})
            client.reset(Namespace(model))
            self.told.append(event | {"kind": "answer", "t": time.monotonic()})
            asked.result(FINAL_WAIT_S).release()

    def kill_service_in_mid_haul(self) -> None:
        """Let hauls pile up before a porter who does nothing, and then kill his service."""
        self.signal_porter(signal.SIGSTOP)
        time.sleep(0.2)
        self.kill_service()

    def kill_service_and_lose_slots(self) -> None:
        """Start on a disk that is new, but for what was reset: the store still has what lay there.

        Without a store it is killed as ever.
        """
        self.service.signal(signal.SIGKILL)
        self.service.wait()
        self.service.close()
        if self.store is not None:
            for name in ("heads", "slab"):
                (self.disk_below.folder / "tier" / name).unlink(missing_ok=True)
        self.service = self.serve()
        self.report.restarts += 1

    # ------------------------------------------------------------------ what goes wrong elsewhere

    def kill_store(self) -> None:
        """Let it begin again, with nothing."""
        if self.store is not None:
            self.store.kill()
            time.sleep(self.random.choice((0.0, 0.3, 1.0)))
            self.store.restart()

    def stop_store(self) -> None:
        if self.store is not None:
            self.store.stop()
            time.sleep(self.random.choice((0.1, 0.6, 1.5)))
            self.store.go_on()

    def hush_store(self) -> None:
        """Let it be reached, and never answer."""
        if self.liar is not None:
            self.liar.mute()
            time.sleep(self.random.choice((0.1, 0.6, 1.5)))
            self.liar.drop()
            self.liar.speak()

    def have_store_lie(self) -> None:
        self.be("lies")

    def have_store_be_slow(self) -> None:
        self.be("slow")

    def have_store_hang_up(self) -> None:
        self.be("cuts")

    def be(self, mood: str) -> None:
        if self.liar is not None:
            self.liar.mood = mood
            time.sleep(MOOD_S)
            self.liar.mood = ""

    def alter_objects(self) -> None:
        if self.store is not None:
            with contextlib.suppress(OSError, ValueError):  # it has just begun
                spoil_objects(self.store, self.random)

    def kill_carrier(self) -> None:
        with contextlib.suppress(OSError):
            for carrier in carriers(self.service):
                os.kill(carrier, signal.SIGKILL)

    # ------------------------------------------------------------------ the course of it

    def run(self, rounds: int, seconds_per_round: float, say: Any) -> Report:
        others = (
            *(self.kill_worker, self.stop_workers, self.stop_workers, self.stop_service),
            *(self.drop_connections, self.half_open_connections, self.fill_disk),
            *(self.kill_porter, self.stop_porter, self.alter_slots, self.fill_disk_below),
            self.reset_with_hauls_out,
        )
        kill, end = self.kill_service, self.end_service
        lasts = (kill, self.kill_service_in_mid_haul, self.kill_service_and_lose_slots, end)
        deck: list[Any] = []
        self.hear_probes()
        self.alone_until = time.monotonic()
        model, answers = str(self.folder / "model"), str(self.folder / "answers.json")
        self.clerks = [self.start("clerk", self.target, one, model, answers) for one in HONEST]
        self.hear_clerks()  # first: their workers take long to load where many others work
        self.actors = [self.act(number) for number in range(ACTORS)]
        self.hear_actors()
        self.returners = [self.come_back(number) for number in range(len(HONEST) * RETURNERS)]
        self.adversaries = [
            self.start("adversary", self.target, self.http) for _ in range(ADVERSARIES)
        ]
        started = time.monotonic()
        for number in range(rounds):
            if number % 4 == 1:
                self.calm_round(number, seconds_per_round)
                continue
            due = time.monotonic() + seconds_per_round
            while time.monotonic() < due - 1.5:
                if not deck:
                    deck = [*others, *self.of_store()]
                    self.random.shuffle(deck)
                self.fault(deck.pop())
                time.sleep(self.random.uniform(0.05, 0.5))
            if not self.first_rss:
                self.first_rss = psutil.Process(self.service.process.pid).memory_info().rss
            self.look_over(number)
            self.fault(lasts[number // 2 % 4])
            time.sleep(max(0.0, due - time.monotonic()))
            say(f"round {number + 1} of {rounds}")
        self.report.rounds = rounds
        self.ended_at = time.monotonic()
        self.report.seconds = self.ended_at - started
        self.settle()
        return self.report

    def of_store(self) -> tuple[Any, ...]:
        """Give some of what can go wrong with a store, if there is one.

        Not all of it together: after each failure nobody asks for a second and more.
        """
        if self.store is None:
            return ()
        moods = (self.have_store_be_slow, self.have_store_hang_up, self.hush_store, self.stop_store)
        ends = (self.kill_store, self.kill_carrier)
        chosen = (self.random.choice(moods), self.random.choice(ends))
        return (*chosen, self.have_store_lie, self.alter_objects)

    def hear_probes(self) -> None:
        """Wait until there were probes with nobody else in the service."""
        due = time.monotonic() + 30
        for number in range(1, 1 + len(self.cancellers)):
            log = self.folder / f"canceller-{number}.log"
            while not (log.exists() and log.read_text().count("probe") > PROBES):
                assert time.monotonic() < due, "nothing is heard of the probes"
                time.sleep(0.1)

    def hear_clerks(self) -> None:
        """Wait until the worker processes have answered lines, and refused some."""
        due = time.monotonic() + PATIENCE_OF_CLERKS_S
        while True:
            time.sleep(0.5)
            told = [one.read_text().splitlines() for one in self.folder.glob("clerk-*.log")]
            heard = [json.loads(lines[-1])["counts"].keys() for lines in told if lines]
            if sum({"answered", "refused"} <= kinds for kinds in heard) == len(self.clerks):
                return
            assert time.monotonic() < due, "nothing is heard of the clerks"

    def hear_actors(self) -> None:
        """Wait until all of them have begun."""
        due = time.monotonic() + PATIENCE_OF_CLERKS_S
        while len(self.logs()) < ACTORS:
            assert time.monotonic() < due, "nothing is heard of the actors"
            time.sleep(0.05)

    def logs(self) -> list[Path]:
        """Find the actors' logs, the viewers' among them."""
        kinds = ("actor", "viewer", "returner")
        return sorted(path for kind in kinds for path in self.folder.glob(f"{kind}-*.log"))

    def calm_round(self, number: int, seconds: float) -> None:
        """Let nothing go wrong but for what the adversaries do, and below the pool."""
        self.hear_porter()
        begun = time.monotonic()
        calm = begun + min(CALM_AFTER_S, seconds / 2)
        time.sleep(calm - begun)
        faults = [self.kill_porter, self.stop_porter, self.fill_disk_below, *self.of_store()]
        self.random.shuffle(faults)
        for fault in (self.alter_slots, *faults[:3]):
            if time.monotonic() < begun + seconds - 1.0:
                time.sleep(self.random.uniform(0.2, 0.8))
                self.fault(fault)
        time.sleep(max(0.0, begun + seconds - time.monotonic()))
        self.report.faults["calm rounds"] += 1
        self.calm.append((calm, time.monotonic()))
        self.look_over(number)

    def look_over(self, number: int) -> None:
        """See that every invariant holds, and that nothing gathers; what lies below, too."""
        leaks = self.report.leaks
        with contextlib.suppress(OSError, psutil.Error):
            if porter := self.porter():
                self.porters[porter] = psutil.Process(porter)
                self.files_below.update(files_in_memory(porter))
                if (count := self.porters[porter].num_fds()) > MOST_FILES_OF_A_PORTER:
                    leaks.append(f"round {number + 1}: the porter has {count} descriptors")
        with contextlib.suppress(OSError, psutil.Error):
            for carrier in carriers(self.service):
                self.porters[carrier] = psutil.Process(carrier)
                if (count := self.porters[carrier].num_fds()) > MOST_FILES_OF_A_PORTER:
                    leaks.append(f"round {number + 1}: the carrier has {count} descriptors")
        service = psutil.Process(self.service.process.pid)
        if (count := len(service.children(True)) - self.first_children) > MORE_CHILDREN:
            leaks.append(f"round {number + 1}: {count} processes more than at first")
        with self.connect() as client:
            told = client.check(CHECKED_AT_ONCE)
            self.count_below(client.snapshot())
        if told.failure:
            leaks.append(f"round {number + 1}: {told.failure[:300]}")

    def count_below(self, now: Snapshot) -> None:
        """Take note of what this service has carried up to now."""
        names = ("evicted", "sunk", "restored", "spoilt", "disk_written", "disk_restored")
        names += ("declined_slow", "declined_busy", "declined_room")
        names += ("remote_stored", "remote_restored", "remote_wrong", "remote_late")
        self.report.below = self.former + Counter({name: getattr(now, name) for name in names})

    def fault(self, fault: Any) -> None:
        self.report.faults[fault.__name__.replace("_", " ")] += 1
        fault()

    def settle(self) -> None:
        """End all workers; see that everything comes back, and read what is left."""
        report = self.report
        time.sleep(TTL_S)
        grown = psutil.Process(self.service.process.pid).memory_info().rss / self.first_rss
        report.rss_growth = grown
        everybody = (*self.actors, *self.cancellers, *self.adversaries, *self.clerks)
        everybody += tuple(self.returners)
        died = [process.args[2] for process in everybody if process.poll() is not None]  # type: ignore[index]
        if died:
            report.leaks.append(f"ended by themselves: {died}")
        for process in self.adversaries:
            process.terminate()
        for process in self.adversaries:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
        for process in self.clerks:
            process.terminate()
        for process in self.clerks:
            process.wait(PATIENCE_OF_CLERKS_S)
        for process in (*self.cancellers, *self.returners):
            process.terminate()
        for process in (*self.cancellers, *self.returners):
            process.wait(PATIENCE_OF_CLERKS_S)
        for actor in self.actors[: ACTORS // 2]:
            actor.terminate()
        for actor in self.actors[: ACTORS // 2]:
            actor.wait(PATIENCE_OF_CLERKS_S)
        for actor in self.actors[ACTORS // 2 :]:
            actor.kill()  # these leave leases behind
        ended_at = time.monotonic()
        with self.connect() as client:
            while (now := client.snapshot()).leases or now.quarantined or now.leaving:
                time.sleep(0.02)
                if time.monotonic() - ended_at > 20:
                    break
            report.settle_s = time.monotonic() - ended_at
            if now.leases or now.quarantined or now.private or now.leaving:
                report.leaks.append(
                    f"{len(now.leases)} leases, {now.quarantined} quarantined, "
                    f"{now.private} private blocks and {now.leaving} on their way down are left"
                )
            due = time.monotonic() + GOING_S
            while (left := self.red_spaces(client)) > MOST_RED_SPACES and time.monotonic() < due:
                time.sleep(0.1)
            report.red_spaces = left
            if not self.has_room_for_namespaces():
                report.leaks.append("the adversaries' namespaces never go")
            if left > MOST_RED_SPACES:
                report.leaks.append(f"{left} namespaces of the adversaries are left")
            if now.free + now.evictable != NUM_BLOCKS:
                report.leaks.append(f"{now.free} free + {now.evictable} evictable != {NUM_BLOCKS}")
        process, due = psutil.Process(self.service.process.pid), time.monotonic() + GOING_S
        while process.num_fds() > self.first_files + LEAK_FILES and time.monotonic() < due:
            time.sleep(0.1)
        report.more_files = process.num_fds() - self.first_files
        if report.more_files > LEAK_FILES:
            report.leaks.append(f"{report.more_files} descriptors more than at first")
        if grown > LEAK_SHARE:
            report.leaks.append(f"the service has grown to {grown:.2f} of its first size")
        self.hear_porter()
        self.spoil("flip", "flip", 2)
        if self.liar is not None:
            self.liar.mood = "lies"
        self.count()
        report.final_tokens = self.read_all()
        due = time.monotonic() + PATIENCE_OF_CLERKS_S
        while not report.restored_tokens and time.monotonic() < due:
            self.read_all()  # on a crowded machine what lies below was slower than computing it
        self.look_over(report.rounds)
        if self.service.process.poll() is not None:
            report.leaks.append(f"the service has ended: {self.service.log()}")
        self.end()

    def end(self) -> None:
        """End the service; see that nothing of it is left, nor of those before it."""
        self.service.signal(signal.SIGTERM)
        self.service.wait()
        leaks = self.report.leaks
        if left := [one.pid for one in self.porters.values() if one.is_running()]:
            leaks.append(f"porters or carriers are left: {left}")
        if files := [str(path) for path in self.files_below if path.exists()]:
            leaks.append(f"files in shared memory are left: {files}")
        folder = self.disk_below.folder / "tier"
        kept = {"lock", *KEPT}
        if files := [path.name for path in folder.iterdir() if path.name not in kept]:
            leaks.append(f"files below the pool are left: {files}")

    def red_spaces(self, client: Client) -> int:
        return sum(one.tenant == RED for one in client.snapshot().namespaces)

    def has_room_for_namespaces(self) -> bool:
        """Whether a tenant that was at the limit may attach others again."""
        with self.connect(RED) as client:
            due = time.monotonic() + GOING_S
            while time.monotonic() < due:
                try:
                    for number in range(8):
                        client.attach(MODELS[0], LAYOUT, salt=f"after {number}").close()
                except CacheError:
                    time.sleep(0.2)
                else:
                    return True
        return False

    def count(self) -> None:
        """Add up what the actors told."""
        report = self.report
        events = read(self.logs()) + self.told
        kinds = Counter(str(e["kind"]) for e in events)
        report.ops = kinds["answer"] + 2 * kinds["hit"] + kinds["found"] + kinds["seen"]
        report.wrong = kinds["wrong"]
        report.moved = kinds["moved"]
        report.restored_tokens = sum(
            int(str(e["count"])) for e in events if e["kind"] == "restored"
        )
        for e in events:
            if e["kind"] == "returned":
                report.returned["requests"] += 1
                for name in ("tokens", "hit", "joined", "restored"):
                    report.returned[name] += int(str(e[name]))
        report.read_tokens = sum(int(str(e["count"])) for e in events if e["kind"] == "seen")
        report.viewed_tokens = sum(int(str(e["count"])) for e in events if e["kind"] == "viewed")
        report.ended_views = kinds["ended view"]
        report.left_views = [str(e["left"]) for e in events if e.get("left")]
        answers = sorted(float(str(e["t"])) for e in events if e["kind"] == "answer")
        lulls = pairwise([*answers, self.ended_at])
        report.longest_lull_s = max((end - start for start, end in lulls), default=report.seconds)
        report.cancelled = sum(int(str(e.get("cancelled", 0))) for e in events)
        self.count_calm(events, read(sorted(self.folder.glob("canceller-*.log"))))
        self.count_red()
        self.count_lines()
        verdict = check(events)
        report.commits, report.hits, report.resets = verdict.commits, verdict.hits, verdict.resets
        report.phantoms, report.forgotten = verdict.phantoms, verdict.forgotten

    def count_calm(self, events: list[dict[str, object]], others: list[dict[str, object]]) -> None:
        """See what the honest met while nothing went wrong but the adversaries."""
        report = self.report
        report.cancelled += sum(int(str(e.get("cancelled", 0))) for e in others)
        probes = [
            (float(str(e["t"])), float(str(e["took"]))) for e in others if e["kind"] == "probe"
        ]
        probes.sort()

        def longest(start: float, end: float) -> float:
            """Give how long the longest look-up took that overlaps with a span of time."""
            told = probes[bisect_left(probes, (start, 0.0)) :]
            return max(
                (
                    took
                    for t, took in takewhile(lambda one: one[0] < end + MOST_LULL_S, told)
                    if t - took < end
                ),
                default=0.0,
            )

        report.calm_s = sum(end - start for start, end in self.calm)
        for e in (*events, *others):
            t, kind = float(str(e["t"])), e["kind"]
            calm = any(start <= t <= end for start, end in self.calm)
            if kind == "probe" and t < self.alone_until:
                report.idle_s.append(float(str(e["took"])))
            elif kind == "probe" and calm:
                report.beside_s.append(float(str(e["took"])))
            elif kind == "waited" and calm:
                took, looked = float(str(e["took"])), float(str(e["looked"]))
                looked = max(looked, longest(t - took - BESIDE_S, t + BESIDE_S))
                report.waits.append((took, float(str(e["predicted"])), looked))
            elif kind == "lost" and calm and float(str(e["patience"])) >= PATIENCE_S[0]:
                report.ended_sessions.append(str(e["why"]))

    def count_red(self) -> None:
        """Add up what the adversaries told last."""
        report = self.report
        for log in sorted(self.folder.glob("adversary-*.log")):
            told = read([log])
            if not told:
                continue
            last: Any = told[-1]
            report.broken += last["broken"]
            for name, count in last["counts"].items():
                kind, _, answer = name.partition(":")
                answers = report.attempts.setdefault(kind, {})
                answers[answer] = answers.get(answer, 0) + count

    def count_lines(self) -> None:
        """Add up what the clerks told last."""
        for log in sorted(self.folder.glob("clerk-*.log")):
            if told := log.read_text().splitlines():
                last = json.loads(told[-1])
                self.report.lines.update(last["counts"])
                self.report.misanswered += last["wrong"]

    def read_all(self) -> int:
        """Read everything that is stored; give how many tokens."""
        return sum(self.read_tenant(tenant) for tenant in HONEST)

    def read_tenant(self, tenant: str) -> int:
        """Read what is stored of a tenant; give how many tokens."""
        total = 0
        with self.connect(tenant) as client:
            stored = [(model, range(NUM_SYSTEMS), NUM_CHATS) for model in MODELS]
            for model, systems, num_chats in (*stored, (LONG_MODEL, LONG_SYSTEMS, NUM_LONG)):
                session = client.attach(model, LAYOUT)
                pool = Pool(map_pool(session.pool), session.pool)
                for system, chat in product(systems, range(num_chats)):
                    whole = tokens_of(system, chat)
                    try:
                        with session.acquire(whole, wait_s=FINAL_WAIT_S) as lease:
                            pool.copy(lease.copies)
                            count = lease.num_cached
                            self.report.wrong += pool.wrong(
                                space(tenant, model), whole, lease.block_table, count
                            )
                            total += count
                            self.report.restored_tokens += lease.ledger.restored
                    except CacheError:
                        continue
        return total

    def close(self) -> None:
        groups = (self.actors, self.cancellers, self.adversaries, self.clerks, self.returners)
        for actor in chain(*groups):
            with contextlib.suppress(ProcessLookupError):
                actor.send_signal(signal.SIGCONT)
            actor.kill()
            actor.wait()
        self.proxy.close()
        self.service.close()
        if self.store is not None and self.liar is not None:
            self.liar.close()
            self.store.kill()
        self.disk.close()
        self.disk_below.close()


def prepare(folder: Path) -> None:
    """Leave the workers' model there, and what it answers alone."""
    arguments = [str(folder / "model"), str(folder / "answers.json")]
    subprocess.run([sys.executable, "-m", "chaos.alone", *arguments], env=environment(), check=True)


def free_port() -> int:
    """Give a port of loopback that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _snapshot() -> Any:
    from prefixcache.v1 import prefixcache_pb2 as pb

    return pb.SnapshotRequest()


@contextlib.contextmanager
def storm(seed: int) -> Iterator[Storm]:
    """A storm in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    made = Storm(folder, seed)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run a storm; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m chaos.storm", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seconds-per-round", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--publish", action="store_true", help=f"put the lines into {DOCUMENT}")
    options = parser.parse_args()
    say = (lambda text: sys.stderr.write(f"\r{text} ")) if sys.stderr.isatty() else (lambda _: None)
    with storm(options.seed) as made:
        made.report.least_per_s = LEAST_OPS_PER_S
        made.report.least_restored = LEAST_RESTORED * options.rounds
        report = made.run(options.rounds, options.seconds_per_round, say)
    text = "\n".join(report.shown())
    if options.json:
        shown = vars(report) | {"failures": report.failures}
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
    else:
        sys.stdout.write(f"{text}\n")
    if options.publish:
        publish(DOCUMENT, "chaos", f"$ make chaos\n{text}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
