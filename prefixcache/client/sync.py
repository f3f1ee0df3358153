"""The synchronous client: a connection, the questions that need no session, and attach."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grpc

from prefixcache.client import codec, outlines, unary
from prefixcache.client.address import Address, default_target
from prefixcache.client.connection import Connection
from prefixcache.client.credentials import Access, Tls
from prefixcache.client.session import Session
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


def connect(
    target: str | None = None,
    *,
    timeout_s: float = 10.0,
    tls: Tls | None = None,
    token: str | None = None,
) -> Client:
    """Connect to the service of this machine.

    Args:
        target: `unix:/path`, a path, or `host:port`; by default the default socket.
        timeout_s: how long any call may go unanswered (beside the time it chose to wait).
        tls: how to speak TLS over TCP; by default as the environment says, or not.
        token: the bearer token that says who this is; by default the environment's, if any.

    Raises:
        ServiceUnavailable: nobody listens there; the message names the command that starts one.
        InvalidRequest: the address cannot be read, or the token would travel in the clear.
    """
    address = Address.parse(target or default_target())
    return Client(address, timeout_s, Access(address, tls, token))


class Client(Connection):
    """A connection to one service.  Context manager; closing it closes its sessions."""

    def __init__(self, address: Address, timeout_s: float, access: Access) -> None:
        super().__init__(address, timeout_s, access)
        address.probe(self.timeout_s)
        self.channel = access.channel(grpc, unary.CHANNEL_OPTIONS)

    def attach(
        self,
        model: str,
        layout: Layout,
        *,
        adapter: str = "",
        salt: str = "",
        tenant: str = "",
        name: str = "",
        keep_alive: bool = True,
    ) -> Session:
        """Join a namespace as a new worker.  Opens a session and starts its heartbeats.

        It also says of this client's lost sessions that nothing writes to their blocks any more,
        but of none that has a lease which is not released, not past its deadline and not dropped:
        keep the lease for as long as you write to its blocks.

        Args:
            model: model and revision.
            layout: shape of its keys and values; must be the pool's.
            adapter: adapter (LoRA) that changes the KV.
            salt: a secret that keeps this namespace apart.
            tenant: whose prompts these are.
            name: for people: appears in snapshots and messages.
            keep_alive: whether to send heartbeats; without them leases end after their ttl.

        Raises:
            LayoutMismatch: the pool holds another layout; the message names both.
            ServiceUnavailable: the service is gone, or about to go.
        """
        self.guard()
        self.address.probe(self.timeout_s)
        namespace = Namespace(model, adapter, tenant, salt)
        request = self.attach_request(namespace, layout, name)
        session = Session(self, request, keep_alive=keep_alive)
        self.attached(session, request)
        return session

    def lookup(self, namespace: Namespace, tokens: TokensLike) -> Lookup:
        """Ask what `acquire` would find there.  Takes nothing; needs no session."""
        return codec.read_lookup(self.call("lookup", unary.lookup(namespace, tokens)))

    def explain(self, namespace: Namespace, tokens: TokensLike) -> Explanation:
        """Ask why each token would or would not be reused there.  Needs no session."""
        return codec.read_explain(self.call("explain", unary.explain(namespace, tokens)))

    def recount(self, request: str, namespace: Namespace | None = None) -> Explanation:
        """Ask why a request that was granted lately was answered as it was.

        Args:
            request: its request id (or that without its last `/part`), or `worker#lease`.
            namespace: where it was; by default, anywhere without a salt.

        Raises:
            NotFound: the service remembers no such request.
        """
        return codec.read_explain(self.call("explain", unary.recount(request, namespace)))

    def check(self, max_runs: int = 20_000) -> str:
        """Have the service check every invariant; give what does not hold, empty if all is well.

        Everybody waits meanwhile.

        Raises:
            InvalidRequest: the trees have more than `max_runs` runs.
        """
        answer = self.call("check", unary.check(max_runs))
        return str(answer.failure)

    def reset(self, namespace: Namespace) -> Reset:
        """Make a namespace forget what it has stored.  Needs no session."""
        return codec.read_reset(self.call("reset", unary.reset(namespace)))

    def pin(self, namespace: Namespace, tokens: TokensLike, *, ttl_s: float) -> Pinned:
        """Let what is stored of a prefix be evicted last for `ttl_s`.  Needs no session."""
        return codec.read_pin(self.call("pin", unary.pin(namespace, tokens, ttl_s)))

    def unpin(self, namespace: Namespace, tokens: TokensLike = b"") -> Unpinned:
        """End the pin of exactly this prefix, or all pins of a namespace.  Needs no session."""
        return codec.read_unpin(self.call("unpin", unary.unpin(namespace, tokens)))

    def quota(self, scope: Namespace | str) -> QuotaInfo:
        """Ask what a namespace, or a tenant by name, may hold, and holds.  Needs no session."""
        return codec.read_quota(self.call("quota", unary.quota(scope)))

    def set_quota(
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
        return codec.read_quota(self.call("quota", request))

    def snapshot(self) -> Snapshot:
        """Ask for the state of the whole cache.  Needs no session."""
        return codec.read_snapshot(self.call("snapshot", pb.SnapshotRequest()))

    def outline(
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
        return outlines.read_outline(self.call("tree", request))

    def watch(
        self,
        from_sequence: int = 0,
        *,
        namespace: Namespace | None = None,
        tokens: bool = False,
    ) -> Iterator[pb.WatchResponse]:
        """Give what enters and leaves the index, as hashes of whole blocks.  Needs no session.

        Never ends by itself.  After a lost connection go on from the last `next_sequence`.

        Args:
            from_sequence: 0: what is stored now, and then what changes; else what changes from
                this event on.
            namespace: only what concerns it.
            tokens: also token ids, where the service allows it.

        Raises:
            InvalidRequest: the service sends no token ids.
            ServiceUnavailable: the connection is lost.
        """
        self.guard()
        with codec.no_foreign_errors("watch"):
            request = pb.WatchRequest(from_sequence=from_sequence, tokens=tokens)
            if namespace is not None:
                codec.write_namespace(namespace, request.namespace)
        method: Any = self.channel.unary_stream(
            unary.WATCH_PATH, pb.WatchRequest.SerializeToString, pb.WatchResponse.FromString
        )
        stream = method(request, metadata=self.metadata)
        try:
            yield from stream
        except grpc.RpcError as error:
            raise unary.read_rpc_error(error, self.address, self.timeout_s) from None
        finally:
            stream.cancel()

    def call(self, verb: str, request: Any) -> Any:
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
            return method(request, timeout=self.timeout_s, metadata=self.metadata)
        except grpc.RpcError as error:
            raise unary.read_rpc_error(error, self.address, self.timeout_s) from None
        except ValueError:  # another thread closed the channel
            self.guard()
            raise

    def close(self) -> None:
        """Close all sessions, then the connection.  Idempotent."""
        if self._closed or self.is_inherited:
            return
        try:
            for session in list(self._sessions):
                session.close()
        finally:
            self._closed = True
            self._sessions.clear()
            self.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
