"""The synchronous client: a connection, the questions that need no session, and attach."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc

from prefixcache.client import calls, codec, unary
from prefixcache.client.address import Address, default_target
from prefixcache.client.connection import Connection
from prefixcache.client.credentials import Access, Tls
from prefixcache.client.session import Session
from prefixcache.errors import ServiceUnavailable
from prefixcache.types import Layout, Namespace
from prefixcache.v1 import prefixcache_pb2 as pb

P = ParamSpec("P")
T = TypeVar("T")


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
    address = Address.parse(default_target() if target is None else target)
    return Client(address, timeout_s, Access(address, tls, token))


def _asks(make: Callable[P, calls.Call[T]]) -> Callable[Concatenate[Client, P], T]:
    """Make the method that sends what `make` describes."""

    def ask(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = make(*args, **kwargs)
        return call.read(self.call(call.verb, call.request))

    return calls.described_by(make, ask)


def _watches(
    make: Callable[P, pb.WatchRequest],
) -> Callable[Concatenate[Client, P], Iterator[pb.WatchResponse]]:
    def watch(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[pb.WatchResponse]:
        self.guard()
        request = make(*args, **kwargs)
        try:
            yield from self._calls.watch(
                unary.watching(self.channel), request, metadata=self.metadata, guard=self.guard
            )
        except grpc.RpcError as error:
            raise unary.read_rpc_error(error, self.address, self.timeout_s) from None
        except ValueError:  # another thread closed the channel
            self.guard()
            raise

    return calls.described_by(make, watch)


_LOOK_S = 0.5
"""Seconds of one look.  Python sees a Ctrl-C that comes just before a wait when the wait ends."""


class _CallThread:
    """Starts and ends the calls and watches of threads that Ctrl-C may interrupt anywhere.

    Inside gRPC it would leave a lock taken, or a call that nobody ends, and the whole channel with
    all its sessions would never hear anything again.  So they only use queues, which hold no lock
    when they are interrupted: those who speak with gRPC never wait for them.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="prefixcache calls", daemon=True)
        self._thread.start()

    def ask(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Make a call and wait for its answer.  Interrupted, it cancels the call.

        Raises:
            ValueError: the client was closed before it could be made.
            Exception: whatever the call raises.
        """
        calls: list[Any] = []
        heard: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def start() -> None:
            try:
                calls.append(call := method.future(*args, **kwargs))
                call.add_done_callback(end)
            except Exception as error:  # noqa: BLE001 - it is raised where it was asked
                heard.put((None, error))

        def end(call: Any) -> None:
            try:
                heard.put((call.result(), None))
            except grpc.FutureCancelledError:
                heard.put((None, call))
            except grpc.RpcError as error:
                heard.put((None, error))

        def look() -> None:
            if not self._thread.is_alive() and not calls:
                raise ValueError("nobody is there any more to make this call")

        try:
            self._tasks.put(start)
            answer, error = _next(heard, look)
        except BaseException:
            self._tasks.put(lambda: [call.cancel() for call in calls])
            raise
        if error is not None:
            raise error
        return answer

    def watch(
        self, method: Any, *args: Any, guard: Callable[[], None], **kwargs: Any
    ) -> Iterator[Any]:
        """Open a stream and give its messages.  Left or interrupted, it cancels the stream.

        A thread of its own reads them, each when it is wanted: who does not look makes the service
        wait.  `guard` is asked while nothing comes: it raises where nothing can come any more.

        Raises:
            Exception: whatever the stream or `guard` raises.
        """
        streams: list[Any] = []
        heard: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def start() -> None:
            try:
                streams.append(stream := method(*args, **kwargs))
                threading.Thread(
                    target=read, args=(stream,), name="prefixcache watch", daemon=True
                ).start()
            except Exception as error:  # noqa: BLE001 - it is raised where it was asked
                heard.put((None, error))

        def read(stream: Any) -> None:
            try:
                for message in stream:
                    heard.put((message, None))
                    if not wanted.get():
                        return
                heard.put((None, None))
            except Exception as error:  # noqa: BLE001 - it is raised where it was asked
                heard.put((None, error))

        def leave() -> None:
            wanted.put(False)
            for stream in streams:
                stream.cancel()

        try:
            self._tasks.put(start)
            while True:
                message, error = _next(heard, guard)
                if error is not None:
                    raise error
                if message is None:
                    return
                yield message
                wanted.put(True)
        finally:
            self._tasks.put(leave)
            wanted.put(False)  # the client may be closed, and nobody there for tasks

    def run(self, task: Callable[[], T]) -> T:
        """Have something done behind what was asked before, and wait for it.

        Interrupted, it is done all the same.

        Raises:
            Exception: whatever it raises.
        """
        heard: queue.SimpleQueue[tuple[list[T], Exception | None]] = queue.SimpleQueue()

        def do() -> None:
            try:
                heard.put(([task()], None))
            except Exception as error:  # noqa: BLE001 - it is raised where it was asked
                heard.put(([], error))

        def look() -> None:
            if not self._thread.is_alive() and heard.empty():
                do()  # all is closed, and nobody else will

        self._tasks.put(do)
        done, error = _next(heard, look)
        if error is not None:
            raise error
        return done[0]

    def do(self, task: Callable[[], object]) -> None:
        """Have something done behind what was asked before."""
        self._tasks.put(task)

    def end(self) -> None:
        """End the thread, once it has done what it was told.  Waits for nothing."""
        self._tasks.put(None)

    def close(self) -> None:
        """End the thread, and wait for that."""
        self.end()
        self._thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


def _may_be_interrupted() -> bool:
    return threading.current_thread() is threading.main_thread()


def _next(heard: queue.SimpleQueue[T], guard: Callable[[], None] = lambda: None) -> T:
    """Wait for what comes next, and now and then for a reason to wait no longer."""
    while True:
        try:
            return heard.get(timeout=_LOOK_S)
        except queue.Empty:
            guard()


class Client(Connection):
    """A connection to one service.  Context manager; closing it closes its sessions."""

    def __init__(self, address: Address, timeout_s: float, access: Access) -> None:
        super().__init__(address, timeout_s, access)
        address.probe(self.timeout_s)
        self.channel = access.channel(grpc, unary.CHANNEL_OPTIONS)
        self._calls = _CallThread()
        weakref.finalize(self, self._calls.end)
        self._undoing: set[Any] = set()
        """Releases under way of what calls that were given up may have got: gRPC cancels one that
        nobody holds."""

    def attach(
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
    ) -> Session:
        """Join a namespace as a new worker.  Opens a session and starts its heartbeats.

        It also says of this client's lost sessions that nothing writes to their blocks any more,
        but of none that has a lease which is not released, not past its deadline and not dropped:
        keep the lease for as long as you write to its blocks.

        Args:
            model: model and revision.
            layout: how its keys and values lie; must be the pool's.
            block_size: tokens of a block, where the worker can work with no other than this; None
                takes the pool's.
            adapter: adapter (LoRA) that changes the KV.
            salt: a secret that keeps this namespace apart.
            tenant: whose prompts these are.
            name: for people: appears in snapshots and messages.
            group: of workers in several processes that write to each other's blocks: a name that
                they share and nobody else can guess.  When one of them dies, what it had leased is
                lent to nobody before all of them have ended.
            keep_alive: whether to send heartbeats; without them leases end after their ttl.

        Raises:
            LayoutMismatch: the pool has another layout or block size; the message names both.
            ServiceUnavailable: the service is gone, or about to go.
        """
        codec.check_flag("keep_alive", keep_alive)
        self.guard()
        self.address.probe(self.timeout_s)
        namespace = Namespace(model, adapter, tenant, salt)
        request = self.attach_request(namespace, layout, block_size, name, group)
        session = Session(self, request, keep_alive=keep_alive, speak=self._speak)
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

    def call(self, verb: str, request: Any) -> Any:
        """Make one unary call and give the answer's message.

        Where it is given up, or its answer lost, leases that it may have been granted are given
        back, unless the request has an id: then it may be made again.

        Raises:
            CacheError: of the class that the service names.
        """
        self.guard()
        method = unary.asking(self.channel, verb)
        request, undo = unary.undoable(verb, request)
        ask = partial(self._calls.ask, method) if _may_be_interrupted() else method
        try:
            return ask(request, timeout=self.timeout_s, metadata=self.metadata)
        except grpc.RpcError as error:
            cause = unary.read_rpc_error(error, self.address, self.timeout_s)
            if isinstance(cause, ServiceUnavailable):
                self._calls.do(partial(self._undo, undo))
            try:
                raise cause from None
            finally:
                del cause  # it has this frame, as `read_rpc_error` says
        except ValueError:  # another thread closed the channel
            self.guard()
            raise
        except KeyboardInterrupt:
            self._calls.do(partial(self._undo, undo))
            raise

    def _speak(self, task: Callable[[], T]) -> T:
        """Do what speaks with gRPC, where no Ctrl-C comes."""
        return self._calls.run(task) if _may_be_interrupted() else task()

    def _undo(self, undo: pb.ReleaseRequest | None) -> None:
        """Send a release, if there is one to send, and wait for nothing."""
        if undo is None:
            return
        method = unary.asking(self.channel, "release")
        with contextlib.suppress(ValueError, grpc.RpcError):  # the channel is closed
            call = method.future(undo, timeout=self.timeout_s, metadata=self.metadata)
            self._undoing.add(call)
            call.add_done_callback(self._undoing.discard)

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
            self._calls.close()
            for release in tuple(self._undoing):
                with contextlib.suppress(grpc.RpcError, grpc.FutureTimeoutError):
                    release.result(self.timeout_s)
            self.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
