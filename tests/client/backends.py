"""Three faces of one cache with one interface: in process, synchronous client, asynchronous client.

The contract tests speak to `Backend` alone, so the same tests run against all three.
"""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import AsyncBatch, AsyncLease, AsyncSession, Reply, connect_async
from prefixcache.client.lease import LeaseState, SignsOfLife
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import CacheError
from prefixcache.types import (
    Grant,
    Namespace,
    Snapshot,
    TableUpdate,
    TicketId,
    Waiting,
    WorkerId,
    pack,
)
from service.service_process import LAYOUT, ServiceProcess, sizes

NUM_BLOCKS = 64
BLOCK_SIZE = 4
TTL_S = 1.0


class Backend(ABC):
    """What the contract tests need."""

    @abstractmethod
    def attach(self, model: str = "model", *, name: str = "", keep_alive: bool = True) -> Any:
        """As the client's `attach`."""

    def pass_time(self, seconds: float) -> None:
        time.sleep(seconds)

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """As the client's `snapshot`."""

    @abstractmethod
    def set_quota(self, scope: Any, *, max_held: int | None, guaranteed: int = 0) -> Any:
        """As the client's `set_quota`."""

    @abstractmethod
    def quota(self, scope: Any) -> Any:
        """As the client's `quota`."""

    def later(self, call: Callable[[], Any]) -> Future[Any]:
        """Start a call that blocks; its outcome comes from the future."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except CacheError as error:
                future.set_exception(error)

        threading.Thread(target=run).start()
        return future

    @abstractmethod
    def clean(self) -> None:
        """End all sessions and forget everything that is stored."""

    def close(self) -> None:  # noqa: B027 - one in this process has nothing to end
        """End for good."""


# ------------------------------------------------------------------------------------ in process


class LocalBackend(Backend):
    """`PrefixCache` itself, on a clock that the tests move."""

    def __init__(self, *, segments: bool = False) -> None:
        secret = bytes(range(16)) if segments else None
        self.cache = PrefixCache(NUM_BLOCKS, BLOCK_SIZE, ttl_s=TTL_S, segments_secret=secret)
        self.now = 100.0
        self.sessions: list[LocalSession] = []
        self.waiting: dict[TicketId, tuple[Future[Any], Any]] = {}
        self.count = 0

    def attach(self, model: str = "model", *, name: str = "", keep_alive: bool = True) -> Any:
        self.count += 1
        session = LocalSession(self, WorkerId(name or f"w{self.count}"), Namespace(model))
        session.keep_alive = keep_alive
        first = 1000 * self.count
        self.cache.attach(session.worker, session.namespace, first_lease=first, now=self.now)
        self.sessions.append(session)
        return session

    def pass_time(self, seconds: float) -> None:
        for _ in range(4):
            self.now += seconds / 4
            for session in self.sessions:
                if session.keep_alive:
                    self.cache.renew(session.worker, now=self.now)
            self.cache.expire(now=self.now)
            self.settle()

    def settle(self) -> None:
        for ticket, outcome in self.cache.take_outcomes():
            future, asker = self.waiting.pop(ticket)
            if isinstance(outcome, CacheError):
                future.set_exception(outcome)
            elif isinstance(outcome, TableUpdate):
                future.set_result(asker.apply(outcome))
            else:
                future.set_result(LocalLease(outcome, asker))
        self.cache.check()

    def snapshot(self) -> Snapshot:
        return self.cache.snapshot(now=self.now)

    def set_quota(self, scope: Any, *, max_held: int | None, guaranteed: int = 0) -> Any:
        answer = self.cache.set_quota(scope, max_held=max_held, guaranteed=guaranteed, now=self.now)
        self.settle()
        return answer

    def quota(self, scope: Any) -> Any:
        return self.cache.quota(scope)

    def clean(self) -> None:
        for session in list(self.sessions):
            session.close()
        for info in self.snapshot().quotas:
            scope = info.tenant if info.namespace is None else info.namespace
            self.set_quota(scope, max_held=None)
        for namespace in self.snapshot().namespaces:
            self.cache.reset(namespace)
        self.cache.check()


class LocalSession:
    """Speaks like `prefixcache.client.Session`."""

    def __init__(self, backend: LocalBackend, worker: WorkerId, namespace: Namespace) -> None:
        self.backend = backend
        self.worker = worker
        self.namespace = namespace
        self.keep_alive = True
        self.signs = SignsOfLife()

    def do(self, verb: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return verb(*args, **kwargs, now=self.backend.now)
        finally:
            self.backend.settle()

    def acquire_later(
        self,
        tokens: Any,
        *,
        wait_s: float = 60.0,
        salt: str | None = None,
        adapter: str | None = None,
        **terms: Any,
    ) -> Future[Any]:
        own = self.namespace
        namespace = own._replace(
            salt=own.salt if salt is None else salt,
            adapter=own.adapter if adapter is None else adapter,
        )
        cache, backend = self.backend.cache, self.backend
        future: Future[Any] = Future()
        try:
            outcome = cache.acquire(
                self.worker,
                namespace,
                pack(tokens),
                wait_s=wait_s,
                attached=namespace == own,
                now=backend.now,
                **terms,
            )
        except CacheError as error:
            future.set_exception(error)
            return future
        if isinstance(outcome, Waiting):
            ticket = outcome.ticket
            backend.waiting[ticket] = future, self

            def cancelled(future: Future[Any]) -> None:
                if future.cancelled():
                    self.do(cache.cancel, self.worker, ticket)

            future.add_done_callback(cancelled)
        else:
            future.set_result(LocalLease(outcome, self))
        backend.settle()
        return future

    def acquire(self, tokens: Any, **kwargs: Any) -> LocalLease:
        lease: LocalLease = self.acquire_later(tokens, **({"wait_s": 0.0} | kwargs)).result(0)
        return lease

    def lookup(self, tokens: Any) -> Any:
        return self.backend.cache.lookup(self.namespace, pack(tokens))

    def explain(self, tokens: Any) -> Any:
        return self.backend.cache.explain(self.namespace, pack(tokens), now=self.backend.now)

    def reset(self) -> Any:
        return self.backend.cache.reset(self.namespace)

    def pin(self, tokens: Any, *, ttl_s: float) -> Any:
        return self.do(self.backend.cache.pin, self.namespace, pack(tokens), ttl_s=ttl_s)

    def unpin(self, tokens: Any = b"") -> Any:
        return self.backend.cache.unpin(self.namespace, pack(tokens))

    def snapshot(self) -> Snapshot:
        return self.backend.snapshot()

    def renew(self) -> None:
        self.do(self.backend.cache.renew, self.worker)

    def batch(self) -> LocalBatch:
        return LocalBatch(self)

    def post(self, batch: LocalBatch, on_error: Callable[[Any], object] | None = None) -> None:
        batch.__exit__(None)
        for reply, _ in batch.ops:
            if reply.error is not None and on_error is not None:
                on_error(reply.error)

    def close(self) -> None:
        if self in self.backend.sessions:
            self.backend.sessions.remove(self)
            self.do(self.backend.cache.worker_gone, self.worker)

    def __enter__(self) -> LocalSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalLease(LeaseState):
    """Speaks like `prefixcache.client.Lease`."""

    def __init__(self, grant: Grant, session: LocalSession) -> None:
        super().__init__(grant, session, 0.0)
        self.session = session
        self.cache = session.backend.cache

    def commit(self, num_tokens: int, new_tokens: Any = b"") -> Any:
        new = pack(new_tokens)
        return self.session.do(self.cache.commit, self.session.worker, self.id, num_tokens, new)

    def extend_later(self, num_tokens: int, *, wait_s: float) -> Future[Any]:
        backend, cache, worker = self.session.backend, self.cache, self.session.worker
        future: Future[Any] = Future()
        outcome = cache.extend(worker, self.id, num_tokens, wait_s=wait_s, now=backend.now)
        if isinstance(outcome, Waiting):
            backend.waiting[outcome.ticket] = future, self
        else:
            future.set_result(self.apply(outcome))
        return future

    def extend(self, num_tokens: int, *, wait_s: float = 0.0) -> Any:
        do = self.session.do
        return self.apply(do(self.cache.extend, self.session.worker, self.id, num_tokens))

    def truncate(self, num_tokens: int) -> Any:
        do = self.session.do
        return self.apply(do(self.cache.truncate, self.session.worker, self.id, num_tokens))

    def fork(self, n: int) -> list[LocalLease]:
        grants = self.session.do(self.cache.fork, self.session.worker, self.id, n)
        return [LocalLease(grant, self.session) for grant in grants]

    def release(self) -> Any:
        return self.session.do(self.cache.release, self.session.worker, self.id)

    def __enter__(self) -> LocalLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class LocalBatch:
    """Runs its ops when the block ends, in order."""

    def __init__(self, session: LocalSession) -> None:
        self.session = session
        self.ops: list[tuple[Reply[Any], Callable[[], Any]]] = []

    def acquire_later(self, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def arrived(granted: Future[Any]) -> None:
            if granted.exception() is not None:
                future.set_exception(granted.exception())
            else:
                future.set_result(granted.result())

        def run() -> None:
            self.session.acquire_later(*args, **kwargs).add_done_callback(arrived)

        self.ops.append((Reply(0), run))
        return future

    def __getattr__(self, verb: str) -> Any:
        def add(*args: Any, **kwargs: Any) -> Reply[Any]:
            reply: Reply[Any] = Reply(0)
            on_session = verb in (
                *("acquire", "lookup", "explain", "reset", "pin", "unpin", "snapshot"),
            )
            owner = self.session if on_session else args[0]
            rest = args if on_session else args[1:]
            self.ops.append((reply, lambda: getattr(owner, verb)(*rest, **kwargs)))
            return reply

        return add

    def __enter__(self) -> LocalBatch:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        for reply, run in self.ops:
            try:
                reply.settle(run())
            except CacheError as error:
                reply.settle(error)


# ------------------------------------------------------------------------------- another process


class RemoteBackend(Backend):
    """A service in another process, through the synchronous client."""

    def __init__(self, target: str, *flags: str) -> None:
        self.service = ServiceProcess(
            target,
            *sizes(NUM_BLOCKS, BLOCK_SIZE),
            *("--ttl", str(TTL_S), "--log-level", "warning", *flags),
        )
        self.client = prefixcache.connect(self.service.target)
        self.sessions: list[Any] = []

    def attach(self, model: str = "model", *, name: str = "", keep_alive: bool = True) -> Any:
        session = self.client.attach(model, LAYOUT, name=name, keep_alive=keep_alive)
        self.sessions.append(session)
        return session

    def snapshot(self) -> Snapshot:
        return self.client.snapshot()

    def set_quota(self, scope: Any, *, max_held: int | None, guaranteed: int = 0) -> Any:
        return self.client.set_quota(scope, max_held=max_held, guaranteed=guaranteed)

    def quota(self, scope: Any) -> Any:
        return self.client.quota(scope)

    def clean(self) -> None:
        for session in self.sessions:
            session.close()
        self.sessions.clear()
        for info in self.snapshot().quotas:
            scope = info.tenant if info.namespace is None else info.namespace
            self.set_quota(scope, max_held=None)
        for namespace in self.client.snapshot().namespaces:
            self.client.reset(namespace)

    def close(self) -> None:
        self.client.close()
        assert self.service.stop() == 0


class AsyncBackend(RemoteBackend):
    """The same, through the asynchronous client on an event loop in a thread."""

    def __init__(self, target: str, *flags: str) -> None:
        super().__init__(target, *flags)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.async_client = self.run(connect_async(self.service.target))

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE_S)

    def attach(self, model: str = "model", *, name: str = "", keep_alive: bool = True) -> Any:
        made = self.run(self.async_client.attach(model, LAYOUT, name=name, keep_alive=keep_alive))
        session = Facade(self, made)
        self.sessions.append(session)
        return session

    def close(self) -> None:
        self.run(self.async_client.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        super().close()


class Facade:
    """Calls the coroutines of an asynchronous object on its loop and waits for them."""

    def __init__(self, backend: AsyncBackend, inner: Any) -> None:
        self._backend = backend
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            async def on_loop() -> Any:
                plain = [arg._inner if isinstance(arg, Facade) else arg for arg in args]
                outcome = value(*plain, **kwargs)
                return await outcome if asyncio.iscoroutine(outcome) else outcome

            return self._wrap(self._backend.run(on_loop()))

        return call

    def _wrap(self, value: Any) -> Any:
        if isinstance(value, AsyncSession | AsyncLease | AsyncBatch):
            return Facade(self._backend, value)
        if isinstance(value, list):
            return [self._wrap(item) for item in value]
        if isinstance(value, Reply):
            return FacadeReply(self, value)
        return value

    def acquire_later(self, tokens: Any, *, wait_s: float = 60.0, **kwargs: Any) -> Future[Any]:
        if isinstance(self._inner, AsyncBatch):

            async def add() -> Any:
                return self._inner.acquire_later(tokens, wait_s=wait_s, **kwargs)

            return self._later(self._backend.run(add()))

        async def on_loop() -> Any:
            return self._wrap(await self._inner.acquire(tokens, wait_s=wait_s, **kwargs))

        return asyncio.run_coroutine_threadsafe(on_loop(), self._backend.loop)

    def _later(self, inner: asyncio.Future[Any]) -> Future[Any]:
        async def on_loop() -> Any:
            return self._wrap(await inner)

        return asyncio.run_coroutine_threadsafe(on_loop(), self._backend.loop)

    def extend_later(self, num_tokens: int, *, wait_s: float) -> Future[Any]:
        async def on_loop() -> Any:
            return await self._inner.extend(num_tokens, wait_s=wait_s)

        return asyncio.run_coroutine_threadsafe(on_loop(), self._backend.loop)

    def __enter__(self) -> Facade:
        return self._wrap(self._backend.run(self._inner.__aenter__()))

    def __exit__(self, *details: Any) -> None:
        self._backend.run(self._inner.__aexit__(*details))


class FacadeReply:
    """A reply whose answer may be a lease."""

    def __init__(self, facade: Facade, reply: Reply[Any]) -> None:
        self._facade = facade
        self._reply = reply

    def result(self) -> Any:
        return self._facade._wrap(self._reply.result())


BACKENDS: dict[str, Callable[[str], Backend]] = {
    "in process": lambda target: LocalBackend(),
    "sync client": RemoteBackend,
    "async client": AsyncBackend,
}
