"""The asynchronous client: the same names as the synchronous one, awaited."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from prefixcache.client import codec, outlines, unary
from prefixcache.client.address import Address, default_target
from prefixcache.client.aio_session import AsyncSession, refuse_other_loop
from prefixcache.client.connection import Connection
from prefixcache.client.credentials import Access, Tls
from prefixcache.errors import ServiceUnavailable
from prefixcache.outline import Order, Outline
from prefixcache.types import (
    Explanation,
    Layout,
    Lookup,
    Namespace,
    Pinned,
    QuotaInfo,
    Reset,
    Snapshot,
    TokensLike,
    Unpinned,
)
from prefixcache.v1 import prefixcache_pb2 as pb


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
    address = Address.parse(target or default_target())
    access = Access(address, tls, token)
    await asyncio.to_thread(address.probe, timeout_s)
    return AsyncClient(address, timeout_s, access)


class AsyncClient(Connection):
    """A connection to one service.  Async context manager; closing it closes its sessions."""

    def __init__(self, address: Address, timeout_s: float, access: Access) -> None:
        super().__init__(address, timeout_s, access)
        self._loop = asyncio.get_running_loop()
        self.channel = access.channel(grpc.aio, unary.CHANNEL_OPTIONS)
        self._closing: asyncio.Task[None] | None = None

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
        adapter: str = "",
        salt: str = "",
        tenant: str = "",
        name: str = "",
        keep_alive: bool = True,
    ) -> AsyncSession:
        """Join a namespace as a new worker; see `Client.attach`.

        Raises:
            LayoutMismatch: the pool holds another layout; the message names both.
            ServiceUnavailable: the service is gone, or about to go.
        """
        self.guard()
        await asyncio.to_thread(self.address.probe, self.timeout_s)
        namespace = Namespace(model, adapter, tenant, salt)
        request = self.attach_request(namespace, layout, name)
        session = AsyncSession(self)
        await session._open(request, keep_alive=keep_alive)
        self.attached(session, request)
        return session

    async def lookup(self, namespace: Namespace, tokens: TokensLike) -> Lookup:
        """Ask what `acquire` would find there.  Takes nothing; needs no session."""
        return codec.read_lookup(await self.call("lookup", unary.lookup(namespace, tokens)))

    async def explain(self, namespace: Namespace, tokens: TokensLike) -> Explanation:
        """Ask why each token would or would not be reused there.  Needs no session."""
        return codec.read_explain(await self.call("explain", unary.explain(namespace, tokens)))

    async def recount(self, request: str, namespace: Namespace | None = None) -> Explanation:
        """Ask why a request that was granted lately was answered as it was.

        Args:
            request: its request id (or that without its last `/part`), or `worker#lease`.
            namespace: where it was; by default, anywhere without a salt.

        Raises:
            NotFound: the service remembers no such request.
        """
        return codec.read_explain(await self.call("explain", unary.recount(request, namespace)))

    async def check(self, max_runs: int = 20_000) -> str:
        """Have the service check every invariant; give what does not hold, empty if all is well.

        Everybody waits meanwhile.

        Raises:
            InvalidRequest: the trees have more than `max_runs` runs.
        """
        answer = await self.call("check", unary.check(max_runs))
        return str(answer.failure)

    async def reset(self, namespace: Namespace) -> Reset:
        """Make a namespace forget what it has stored.  Needs no session."""
        return codec.read_reset(await self.call("reset", unary.reset(namespace)))

    async def pin(self, namespace: Namespace, tokens: TokensLike, *, ttl_s: float) -> Pinned:
        """Let what is stored of a prefix be evicted last for `ttl_s`.  Needs no session."""
        return codec.read_pin(await self.call("pin", unary.pin(namespace, tokens, ttl_s)))

    async def unpin(self, namespace: Namespace, tokens: TokensLike = b"") -> Unpinned:
        """End the pin of exactly this prefix, or all pins of a namespace.  Needs no session."""
        return codec.read_unpin(await self.call("unpin", unary.unpin(namespace, tokens)))

    async def quota(self, scope: Namespace | str) -> QuotaInfo:
        """Ask what a namespace, or a tenant by name, may hold, and holds.  Needs no session."""
        return codec.read_quota(await self.call("quota", unary.quota(scope)))

    async def set_quota(
        self, scope: Namespace | str, *, max_held: int | None, guaranteed: int = 0
    ) -> QuotaInfo:
        """Say what a namespace, or a tenant by name, may hold.  Needs no session.

        Args:
            scope: whose quota.
            max_held: most blocks that its leases may hold; None is no limit.
            guaranteed: stored blocks up to which nothing of it is evicted while others have
                evictable ones.
        """
        request = unary.quota(scope, change=True, max_held=max_held, guaranteed=guaranteed)
        return codec.read_quota(await self.call("quota", request))

    async def snapshot(self) -> Snapshot:
        """Ask for the state of the whole cache.  Needs no session."""
        return codec.read_snapshot(await self.call("snapshot", pb.SnapshotRequest()))

    async def outline(
        self,
        namespace: Namespace | None = None,
        *,
        order: Order = Order.TOKENS,
        max_branches: int = 1000,
        max_depth: int | None = None,
        ghosts: bool = True,
    ) -> Outline:
        """Ask for the largest or hottest branches of the trees, the rest summed up.

        Args:
            namespace: which tree; all, if None.
            order: which branches are kept, and which comes first.
            max_branches: how many are kept in all.
            max_depth: runs below the root beyond which all is summed up.
            ghosts: whether evicted runs are shown.
        """
        request = outlines.request(namespace, order, max_branches, max_depth, ghosts)
        return outlines.read_outline(await self.call("tree", request))

    async def call(self, verb: str, request: Any) -> Any:
        """Make one unary call and give the answer's message.

        Raises:
            CacheError: of the class that the service names.
        """
        self.guard()
        rpc = unary.RPCS[verb]
        method: Any = self.channel.unary_unary(
            rpc.path, rpc.request.SerializeToString, rpc.response.FromString
        )
        try:
            return await method(request, timeout=self.timeout_s, metadata=self.metadata)
        except grpc.aio.UsageError:  # closed meanwhile
            raise ServiceUnavailable("this client is closed: connect again") from None
        except grpc.aio.AioRpcError as error:
            raise unary.read_rpc_error(error, self.address, self.timeout_s) from None

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
        finally:
            self._closed = True
            self._sessions.clear()
            await self.channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
