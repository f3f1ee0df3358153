"""The asynchronous client: the same names as the synchronous one, awaited."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc
import grpc.aio

from prefixcache.client import calls, codec, unary
from prefixcache.client.address import Address, default_target
from prefixcache.client.async_session import AsyncSession, refuse_other_loop
from prefixcache.client.connection import Connection
from prefixcache.client.credentials import Access, Tls
from prefixcache.errors import ServiceUnavailable
from prefixcache.types import Layout, Namespace
from prefixcache.v1 import prefixcache_pb2 as pb

P = ParamSpec("P")
T = TypeVar("T")


async def connect_async(
    target: str | None = None,
    *,
    timeout_s: float = 10.0,
    tls: Tls | None = None,
    token: str | None = None,
) -> AsyncClient:
    """Connect to the service of this machine; see `connect`.

    Raises:
        ServiceUnavailable: nobody listens there; the message names the command that starts one.
        InvalidRequest: the address cannot be read, or the token would travel in the clear.
    """
    address = Address.parse(default_target() if target is None else target)
    access = Access(address, tls, token)
    await asyncio.to_thread(address.probe, timeout_s)
    return AsyncClient(address, timeout_s, access)


def _asks(
    make: Callable[P, calls.Call[T]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """Make the method that sends what `make` describes."""

    async def ask(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = make(*args, **kwargs)
        return call.read(await self.call(call.verb, call.request))

    return calls.described_by(make, ask)


def _watches(
    make: Callable[P, pb.WatchRequest],
) -> Callable[Concatenate[AsyncClient, P], AsyncGenerator[pb.WatchResponse, None]]:
    async def watch(
        self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncGenerator[pb.WatchResponse, None]:
        self.guard()
        request = make(*args, **kwargs)
        with self._own_errors():
            stream = unary.watching(self.channel)(request, metadata=self.metadata)
            try:
                async for response in stream:
                    yield response
            finally:
                stream.cancel()

    return calls.described_by(make, watch)


class AsyncClient(Connection):
    """A connection to one service.  Async context manager; closing it closes its sessions."""

    def __init__(self, address: Address, timeout_s: float, access: Access) -> None:
        super().__init__(address, timeout_s, access)
        self._loop = asyncio.get_running_loop()
        self.channel = access.channel(grpc.aio, unary.CHANNEL_OPTIONS)
        self._closing: asyncio.Task[None] | None = None
        self._undoing: set[asyncio.Task[None]] = set()
        """Releases of what calls that were given up may have been granted."""

    def guard(self) -> None:
        """Refuse a call that cannot be made; see `Connection.guard`.

        Raises:
            InvalidRequest: it comes from another event loop.
        """
        super().guard()
        refuse_other_loop(self._loop, "client")

    async def attach(
        self,
        model: str,
        layout: Layout,
        *,
        block_size: int | None = None,
        adapter: str = "",
        salt: str = "",
        tenant: str = "",
        name: str = "",
        group: str = "",
        keep_alive: bool = True,
    ) -> AsyncSession:
        """Join a namespace as a new worker; see `Client.attach`.

        Raises:
            LayoutMismatch: the pool has another layout or block size; the message names both.
            ServiceUnavailable: the service is gone, or about to go.
        """
        codec.check_flag("keep_alive", keep_alive)
        self.guard()
        await asyncio.to_thread(self.address.probe, self.timeout_s)
        namespace = Namespace(model, adapter, tenant, salt)
        request = self.attach_request(namespace, layout, block_size, name, group)
        session = AsyncSession(self)
        await session._open(request, keep_alive=keep_alive)
        self.attached(session, request)
        return session

    lookup = _asks(calls.lookup)
    explain = _asks(calls.explain)
    recount = _asks(calls.recount)
    check = _asks(calls.check)
    reset = _asks(calls.reset)
    reset_unnamed = _asks(calls.reset_unnamed)
    pin = _asks(calls.pin)
    unpin = _asks(calls.unpin)
    quota = _asks(calls.quota)
    set_quota = _asks(calls.set_quota)
    snapshot = _asks(calls.snapshot)
    outline = _asks(calls.outline)
    watch = _watches(calls.watch)

    async def call(self, verb: str, request: Any) -> Any:
        """Make one unary call and give the answer's message; see `Client.call`.

        Raises:
            CacheError: of the class that the service names.
        """
        self.guard()
        method = unary.asking(self.channel, verb)
        request, undo = unary.undoable(verb, request)
        try:
            with self._own_errors():
                return await method(request, timeout=self.timeout_s, metadata=self.metadata)
        except (ServiceUnavailable, asyncio.CancelledError):
            if undo is not None and not self._closed:
                task = self._loop.create_task(self._undo(undo))
                self._undoing.add(task)
                task.add_done_callback(self._undoing.discard)
            raise

    async def _undo(self, undo: pb.ReleaseRequest) -> None:
        """Send a release; what becomes of it is the service's business."""
        method = unary.asking(self.channel, "release")
        with contextlib.suppress(grpc.aio.BaseError, grpc.RpcError, asyncio.CancelledError):
            await method(undo, timeout=self.timeout_s, metadata=self.metadata)

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise unary.read_rpc_error(error, self.address, self.timeout_s) from None
        except (grpc.aio.UsageError, asyncio.CancelledError):
            # Closing the channel cancels its calls: whoever waits for one was not cancelled.
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise ServiceUnavailable("this client is closed: connect again") from None

    async def close(self) -> None:
        """Close all sessions, then the connection.  Idempotent."""
        if self.is_inherited:
            return
        if self._loop.is_closed():
            for session in list(self._sessions):
                await session.close()
            self._closed = True
            return
        refuse_other_loop(self._loop, "client")
        if self._closing is None:
            self._closing = self._loop.create_task(self._end())
        # Whoever is cancelled here only stops waiting: the connection ends all the same.
        await asyncio.shield(self._closing)

    async def _end(self) -> None:
        try:
            for session in list(self._sessions):
                await session.close()
            await asyncio.gather(*self._undoing)
        finally:
            self._closed = True
            self._sessions.clear()
            await self.channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
