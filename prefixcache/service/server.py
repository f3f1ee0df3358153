"""The server process: start, serve, drain, end.

```
SIGTERM or Ctrl-C ─► health NOT_SERVING, no new leases ─► leases out: 0, or --grace is over ─► end
again Ctrl-C      ─► end at once
```
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import structlog
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from prefixcache import core_build
from prefixcache.client.unary import SERVICE
from prefixcache.config import ServeSettings, format_size
from prefixcache.errors import InvalidRequest, ServiceUnavailable
from prefixcache.extras import how_to_install
from prefixcache.remote_address import MOONCAKE
from prefixcache.service import preflight
from prefixcache.service.auth.authenticator import IdentityFile
from prefixcache.service.auth.connections import Connections
from prefixcache.service.auth.identity import Identities
from prefixcache.service.auth.standing import OpenCalls
from prefixcache.service.backing import Backing, remote_ca
from prefixcache.service.collector import collect_often
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.descriptors import Descriptors, raise_limit
from prefixcache.service.domain import Domain, make_domains
from prefixcache.service.events.anonymiser import Anonymiser
from prefixcache.service.events.recorder import Recorder
from prefixcache.service.failures import Failures
from prefixcache.service.grpc import acceptor, unary
from prefixcache.service.grpc.endpoint import Endpoint, make_endpoints, open_endpoints
from prefixcache.service.handlers import Handlers
from prefixcache.service.observe import log as logging
from prefixcache.service.persistence.directory import FORMER, Condition
from prefixcache.service.tiers.disk import DiskFolder
from prefixcache.service.tiers.remote.store import RemoteError
from prefixcache.service.tiers.remote.valkey import Valkey
from prefixcache.texts import many

if TYPE_CHECKING:
    from prefixcache.service.events.publisher import Publisher
    from prefixcache.service.http.http_server import HttpServer
    from prefixcache.service.observe.tracing import Tracer

_LAST_WORDS_S = 0.5
"""What the streams that are still open get to send what they have, once the leases are back."""

_PORTER_S = 5.0
"""How long a start waits for who brings back what an earlier life left on disk."""

_LOOK_S = 0.01

_FORMER_S = 0.1
"""How often to look whether processes still map the pool as it was before this service."""

_KEPT_BYTES = 64 << 20
"""What the allocator may keep for itself: four copies of the largest message."""
_MAPPED_BYTES = 32 << 20
"""From this size on it maps memory for one object, the most that it can be told."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""

_STOP = (signal.SIGTERM, signal.SIGINT)

log = structlog.get_logger(__name__)


def run(
    settings: ServeSettings,
    announce: Callable[[str], None],
    make_backing: Callable[[ServeSettings], Backing] = Backing,
) -> int:
    """Serve until told to stop; give the exit code.

    Args:
        settings: all of them.
        announce: gets the lines for people: what was derived, and where it listens.
        make_backing: what the service owns; benchmarks put a cache without content here.

    Raises:
        CacheError: the service cannot start; the message says what to do.
    """
    logging.set_up(settings.log_level)
    keep_freed_memory()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, announce, make_backing))
    return 0


def keep_freed_memory() -> None:
    """Let the allocator keep what a large message took, and not give it back after each.

    It is read into memory that is new and gets zeroed page by page otherwise, on the event loop:
    three quarters of what a message of 16 MB takes there.  Does nothing without glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


async def _serve(
    settings: ServeSettings,
    announce: Callable[[str], None],
    make_backing: Callable[[ServeSettings], Backing],
) -> None:
    identity_file = IdentityFile(settings.identities)
    memory = {} if identity_file.current is None else identity_file.current.domains
    preflight.check(settings, memory)
    calls = OpenCalls(identity_file)
    num_sockets = 0 if identity_file.current is None else len(identity_file.current.sockets)
    published = [one for one in (settings.events, settings.events_replay) if one is not None]
    descriptors = Descriptors.split(
        raise_limit(), num_sockets, max(1, len(settings.listen)), len(published)
    )
    connections = Connections()
    endpoints = make_endpoints(settings, identity_file, calls, descriptors, connections)
    for endpoint in endpoints:
        # Before the pool: a second service must not take its memory first.
        endpoint.listener.claim()
    domains = make_domains(settings, memory, make_backing)
    for name, one in domains.items():
        identity_file.tell(lambda all_, name=name, one=one: one.set_tenants(all_.tenants_of(name)))  # type: ignore[misc]
    backing, handlers = domains[""].backing, domains[""].handlers
    formers = [
        asyncio.ensure_future(_await_former(one.backing, one.deliveries))
        for one in domains.values()
    ]
    for former, one in zip(formers, domains.values(), strict=True):
        one.handlers.failures.watch(former, "the wait for an earlier life's workers")
    patrol = asyncio.ensure_future(_patrol(calls, domains))
    handlers.failures.watch(patrol, "the patrol that ends the calls of changed identities")
    doorkeeper = asyncio.ensure_future(connections.patrol())
    handlers.failures.watch(doorkeeper, "the patrol that ends connections that prove nothing")
    background = [*formers, patrol, doorkeeper]
    tracer = _make_tracer(settings, handlers.failures)
    for one in domains.values():
        one.handlers.tracer = tracer
    verbs = {name: one.handlers for name, one in domains.items()}
    http = _make_http(settings, verbs, descriptors.http)
    publisher = _make_publisher(settings, handlers, descriptors.events)
    alive = health.aio.HealthServicer()
    for endpoint in endpoints:
        health_pb2_grpc.add_HealthServicer_to_server(alive, endpoint.server)
        if settings.reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, endpoint.server)
    try:
        listening = open_endpoints(
            endpoints, lambda authenticator: unary.service(verbs, authenticator), connections
        )
        identity_file.tell(connections.set_tenants)
        for one in domains.values():
            one.handlers.listening = listening
        handlers.recorder = _start_recorder(settings, handlers.failures)
        stop = _stop_on_signals()
        lost = _stop_without_owner(backing, stop)
        deaf = _Deaf(stop)
        # First what may be refused: then nobody has found the service who would lose it again.
        page = "" if http is None else await http.start()
        events = "" if publisher is None else publisher.start()
        await _begin_hauling(domains)
        for endpoint in endpoints:
            await acceptor.start(endpoint.server, deaf.tell)
        for name in ("", SERVICE):
            await alive.set(name, health_pb2.HealthCheckResponse.SERVING)
        if backing.sizes is not None:
            announce(str(backing.sizes))
        else:
            announce(f"layout: the first worker's · memory: {settings.memory:,} bytes")
        announce(_trust(settings, endpoints, list(domains)))
        if descriptors.front < settings.max_workers:
            announce(f"{descriptors}, fewer than --max-workers: raise the limit (ulimit -Hn)")
        runs_as = core_build.kind()
        log.info("core", runs_as=runs_as)
        if runs_as == core_build.STALE:
            announce(f"the core is {runs_as} than those beside it: {core_build.ADVICE}")
        log.info(
            "open files",
            limit=descriptors.total,
            connections=descriptors.front,
            page=descriptors.http,
        )
        for name, one in domains.items():
            if name:
                announce(f"domain {name}: {one.backing.sizes or format_size(memory[name])}")
        for told in _below(settings, backing, await _capacity(settings)):
            announce(told)
        if backing.state is not None:
            announce(_describe(backing.state.condition))
        if backing.certificates is not None:
            announce(f"segments, to who asks for them: {backing.certificates}")
        if handlers.recorder is not None:
            hidden = "anonymised" if settings.anonymise else "every prompt as it is"
            announce(f"recording to {settings.record}: {hidden}")
        if page:
            announce(f"page at {page}/ · metrics at /metrics")
        if events:
            announce(f"events at {events}")
        if handlers.shadows is not None:
            handlers.shadows.begin()
            announce(f"shadow caches: {' · '.join(spec.name for spec in settings.shadow)}")
        announce(f"listening at {', '.join(handlers.listening)}")
        for one in domains.values():
            one.handlers.sampler.start()
        collector = asyncio.ensure_future(collect_often())
        handlers.failures.watch(collector, "the collector of garbage")
        background.append(collector)
        await stop.wait()
        stop.clear()
        await alive.enter_graceful_shutdown()
        hurry = asyncio.ensure_future(stop.wait())
        # Without a pool there is nothing that leases could still do, nor where no call is taken.
        grace = 0.0 if lost.is_set() or deaf.cause else settings.grace
        drained = asyncio.gather(*(_drain(one, grace) for one in domains.values()))
        await asyncio.wait((hurry, drained), return_when=asyncio.FIRST_COMPLETED)
        grace_s = 0.0 if hurry.done() else _LAST_WORDS_S
        for task in (hurry, drained):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        deaf.is_meant = True
        await asyncio.gather(*(endpoint.server.stop(grace_s) for endpoint in endpoints))
        if deaf.cause:
            raise ServiceUnavailable(
                f"gRPC took no calls any more: {deaf.cause}. Start the service again; what is kept "
                "(--state) is found again"
            )
        if lost.is_set():
            raise ServiceUnavailable(
                "the process that owned the pool on the GPU has died, and with it all that was "
                "cached. Start the service again: workers attach to the new pool."
            )
    finally:
        _stop_no_more()
        if http is not None:
            await http.close()
        if publisher is not None:
            await publisher.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)
        for one_task in background:
            one_task.cancel()
        for endpoint in endpoints:
            endpoint.listener.close()
        if backing.owner is not None:
            asyncio.get_running_loop().remove_reader(backing.owner.pidfd)
        for one in domains.values():
            one.close()
        if handlers.recorder is not None:
            handlers.recorder.close()
    log.info("ended")


def _make_http(
    settings: ServeSettings, domains: Mapping[str, Handlers], max_connections: int
) -> HttpServer | None:
    if settings.http is None:
        return None
    from prefixcache.service.http.http_server import (
        HttpServer,
    )  # only who wants it pays for its libraries

    return HttpServer(settings.http, domains, max_connections)


async def _patrol(calls: OpenCalls, domains: Mapping[str, Domain]) -> None:
    """End what belongs to identities that are no longer in the file as they were."""

    def changed(identities: Identities) -> None:
        for one in domains.values():
            one.workers.end_strangers(identities)

    await calls.patrol(changed)


async def _await_former(backing: Backing, deliveries: Deliveries) -> None:
    """Free what workers of an earlier life may still write to, once none of them maps the pool."""
    if backing.state is None:
        return
    while backing.cache is None:
        await asyncio.sleep(_FORMER_S)
    while backing.state.has_former_workers():
        await asyncio.sleep(_FORMER_S)
    if freed := backing.cache.worker_gone(FORMER, now=time.monotonic()):
        log.info("quarantine ended", worker=FORMER, freed=freed, why="nobody maps the former pool")
        deliveries.settle()


def _trust(settings: ServeSettings, endpoints: list[Endpoint], domains: list[str]) -> str:
    """Say plainly who can read what."""
    told = "one pool, one trust domain: whoever may map it can read every prompt's keys and values"
    if len(domains) > 1:
        told = (
            f"{len(domains)} pools, one for each trust domain: whoever may map one can read every "
            "prompt's keys and values in it"
        )
    if settings.identities is None:
        return told
    own = f", {len(endpoints) - 1} with a socket of their own" if len(endpoints) > 1 else ""
    page = "; the page shows every tenant to every user of this machine" if settings.http else ""
    return f"callers are those of {settings.identities}{own} · {told}{page}"


async def _capacity(settings: ServeSettings) -> tuple[int | None, str]:
    """Ask a store of other machines how many bytes it holds; None, and why, if it does not say.

    It is waited for as long as for any call.
    """
    address = settings.remote
    if address is None or address.scheme == MOONCAKE:
        return None, ""

    def ask() -> int | None:
        store = Valkey(address, remote_ca(settings))
        try:
            return store.capacity()
        finally:
            store.close()

    try:
        return await asyncio.to_thread(ask), ""
    except RemoteError as error:
        return None, str(error)


def _below(
    settings: ServeSettings, backing: Backing, capacity: tuple[int | None, str]
) -> Iterator[str]:
    """Say what lies below the pool, each tier in tokens.

    Args:
        settings: What was asked for.
        backing: What became of it.
        capacity: Bytes that a store elsewhere holds, if it says so; if not, why.
    """
    tiers = []
    if settings.host is not None:
        tiers.append((f"{format_size(settings.host)} of the host's memory", backing.num_host))
    if settings.disk is not None and backing.disk is not None:
        size = format_size(settings.disk.num_bytes)
        tiers.append((f"{size} of disk in {backing.disk.path}", backing.disk.num_slots))
    for told, num_slots in tiers:
        line = f"below the pool: {told}"
        if backing.sizes is not None:
            tokens = num_slots * backing.sizes.block_size
            line += f" = {many(num_slots, 'block')} = {tokens:,} tokens"
        yield line
    if backing.disk is not None and backing.sizes is not None:
        yield _found(backing.disk, backing.sizes.block_size)
    if settings.remote is not None:
        signed = "signed" if settings.remote_secret is not None else "not signed"
        line = f"for other machines, too: {settings.remote}, what is stored there is {signed}"
        if backing.sizes is not None:
            size = format_size(backing.object_bytes)
            line += f"; {many(backing.sizes.block_size, 'token')} take {size} there"
        yield line
        yield f"for other machines, too: {_held(backing, *capacity)}"
        yield from _resets_elsewhere(backing.disk)


def _held(backing: Backing, num_bytes: int | None, failure: str) -> str:
    """Say how much a store elsewhere holds."""
    if failure:
        return f"how much it holds is not known: {failure}"
    if num_bytes is None:
        return "it does not say how much it holds: as much as it has memory for"
    line = f"it holds {format_size(num_bytes)}"
    if backing.sizes is not None:
        num_blocks = num_bytes // backing.object_bytes
        tokens = num_blocks * backing.sizes.block_size
        line += f" = about {many(num_blocks, 'block')} = {tokens:,} tokens"
    return f"{line}, of all who use it"


def _resets_elsewhere(disk: DiskFolder | None) -> Iterator[str]:
    """Say what becomes of resets of what is stored for other machines, too, unless all is well."""
    if disk is None:
        yield (
            "for other machines, too: the next start finds again what a reset has taken from this "
            "service: only the folder of --disk remembers resets"
        )
    elif disk.resets.after_loss:
        yield (
            f"for other machines, too: the count of resets in {disk.path} was lost, so this "
            "service finds only what it has stored since; remove the folder, if what was reset "
            "may be found again"
        )


def _found(disk: DiskFolder, block_size: int) -> str:
    """Say what of an earlier life is found again."""
    if disk.cold:
        return f"disk: nothing found again: {disk.cold}"
    if not disk.num_found:
        return "disk: nothing found again: nothing lay there"
    damaged = disk.found.num_damaged
    return (
        f"disk: {many(disk.num_found, 'block')} = {disk.num_found * block_size:,} tokens found "
        f"again in {disk.found.seconds:.1f} s"
        + (f"; {many(damaged, 'slot', 'are')} damaged" if damaged else "")
    )


def _describe(state: Condition) -> str:
    if state.failure:
        return f"state: nothing is kept in {state.folder}: {state.failure}"
    if not state.restored_blocks:
        return f"state: kept in {state.folder}, nothing restored"
    return (
        f"state: {many(state.restored_tokens, 'token')} in "
        f"{many(state.restored_blocks, 'block')} restored "
        f"from {state.folder} in {state.restore_s:.1f} s"
    )


@contextlib.contextmanager
def _needs(flag: str, extra: str) -> Iterator[None]:
    """Say what to install where what is imported inside is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"{flag} needs {error.name}, which is not installed: {how_to_install(extra)}"
        ) from None


def _make_publisher(
    settings: ServeSettings, handlers: Handlers, max_connections: int
) -> Publisher | None:
    if settings.events is None:
        return None
    with _needs("--events", "events"):
        from prefixcache.service.events.publisher import Publisher
    return Publisher(
        handlers.backing,
        handlers.failures,
        handlers.events,
        settings.events,
        settings.events_replay,
        max_connections,
    )


def _make_tracer(settings: ServeSettings, failures: Failures) -> Tracer | None:
    if settings.trace is None:
        return None
    with _needs("--trace", "tracing"):
        from prefixcache.service.observe.tracing import Tracer
    return Tracer(settings.trace, failures)


def _start_recorder(settings: ServeSettings, failures: Failures) -> Recorder | None:
    if settings.record is None:
        return None
    anonymiser = Anonymiser() if settings.anonymise else None
    return Recorder(settings.record, anonymiser, failures=failures)


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _STOP:
        loop.add_signal_handler(number, stop.set)
    return stop


def _stop_no_more() -> None:
    """Leave one more Ctrl-C without effect: the process is ending, and means to end in order."""
    loop = asyncio.get_running_loop()
    for number in _STOP:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


def _stop_without_owner(backing: Backing, stop: asyncio.Event) -> asyncio.Event:
    """Stop when the owner of a pool on a GPU dies; give the event that says so."""
    lost = asyncio.Event()
    if backing.owner is not None:
        loop, owner = asyncio.get_running_loop(), backing.owner

        def died() -> None:
            loop.remove_reader(owner.pidfd)
            log.error("the pool's owner died", pid=owner.pid)
            lost.set()
            stop.set()

        loop.add_reader(owner.pidfd, died)
    return lost


class _Deaf:
    """Stops a service that takes no calls any more: a process that only lives serves nobody."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self.is_meant = False
        """Whether the servers are being stopped."""
        self.cause = ""

    def tell(self, error: BaseException | None) -> None:
        """Hear that a server has ended."""
        if not self.is_meant:
            self.cause = self.cause or repr(error)
            log.error("a server ended by itself", cause=self.cause)
            self._stop.set()


async def _begin_hauling(domains: Mapping[str, Domain]) -> None:
    """Start who moves blocks below the pools.

    Where an earlier life left something on disk, wait for him, some seconds at most: it is there
    for the very first request then.
    """
    deadline = time.monotonic() + _PORTER_S
    for one in domains.values():
        one.haulage.pump()
    awaited = [
        one.haulage
        for one in domains.values()
        if one.backing.disk is not None and one.backing.disk.num_found
    ]
    while time.monotonic() < deadline and not all(one.is_at_work for one in awaited):
        await asyncio.sleep(_LOOK_S)


async def _drain(domain: Domain, grace_s: float) -> None:
    """Give no new leases; wait for those that are out; put on disk what is cached meanwhile.

    Who keeps a lease to the end does not keep others' blocks from getting there.
    """
    handlers = domain.handlers
    handlers.draining = True
    await handlers.workers.refuse_waiting(
        ServiceUnavailable("the service is draining: it gives no new leases")
    )
    deadline = time.monotonic() + grace_s
    log.info("draining", leases=_leases_out(handlers), grace_s=grace_s)
    haulage = domain.haulage
    haulage.begin_putting_down()
    while time.monotonic() < deadline and (haulage.is_putting_down() or _leases_out(handlers)):
        await asyncio.sleep(_LOOK_S)
    if left := _leases_out(handlers):
        log.warning("the grace is over", leases=left)
    haulage.end_putting_down()


def _leases_out(handlers: Handlers) -> int:
    cache = handlers.backing.cache
    return 0 if cache is None else cache.num_leases
