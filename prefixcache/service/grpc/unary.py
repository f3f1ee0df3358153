"""Unary calls: the same handlers for any gRPC client, one call per verb."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from types import GeneratorType
from typing import Any, Never

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from prefixcache.client import codec, unary
from prefixcache.errors import CacheError, InvalidRequest, NotFound, PoolExhausted
from prefixcache.service.answers import question
from prefixcache.service.auth.authenticator import Authenticator
from prefixcache.service.auth.identity import Identity
from prefixcache.service.auth.standing import STANDING
from prefixcache.service.deliveries import Outcome
from prefixcache.service.grpc.bad_request import BadRequest, reader
from prefixcache.service.grpc.handing import Handing
from prefixcache.service.grpc.pieces import in_pieces
from prefixcache.service.grpc.session import SessionStream
from prefixcache.service.grpc.watch import watch
from prefixcache.service.handlers import Handlers
from prefixcache.service.observe.latency import clock
from prefixcache.service.unread import Unread
from prefixcache.service.worker import Asker, Visitor, Worker
from prefixcache.types import Grant, TableUpdate, Waiting
from prefixcache.v1 import prefixcache_pb2 as pb

_LOOKS = frozenset(
    ("lookup", "explain", "reset", "pin", "unpin", "quota", "snapshot", "tree", "check")
)
"""Verbs that need no worker."""

_LONG = frozenset(("snapshot", "tree", "check"))
"""Verbs whose answers are made in steps, and take memory while they are."""

_LARGE = _LONG | {"acquire", "extend", "fork", "truncate", "explain"}
"""Verbs whose answers grow with what is asked for, or stored."""

_ABOUT_ALL = frozenset(("snapshot", "quota", "check"))
"""Of these, those that name no worker."""

_HANDS_OUT = frozenset(("acquire", "fork"))
"""Verbs whose answers are leases."""

MOST_ERROR_BYTES = 1500
"""Of an error's text."""

_calls = itertools.count(1)


def service(
    domains: Mapping[str, Handlers], authenticator: Authenticator
) -> grpc.GenericRpcHandler:
    """Build the gRPC service: every verb as a unary call, and the session.

    Args:
        domains: The verbs, by trust domain.
        authenticator: Tells who calls, and so in which domain.
    """

    async def admit(context: Any, verb: str) -> tuple[Identity, Handlers]:
        standing = STANDING.get()
        try:
            identity = authenticator.identify(context) if standing is None else standing.identity
            if identity.domain not in domains:
                raise NotFound(f"domain {identity.domain!r} begins with the service's next start")
        except CacheError as error:
            domains[""].latency.refuse(verb, error)
            await refuse(context, error)
        return identity, domains[identity.domain]

    def gated(verb: str, response_class: Any) -> Any:
        inner = {name: _serve(one, verb, response_class) for name, one in domains.items()}

        async def call(request: Any, context: Any) -> Any:
            identity, _ = await admit(context, verb)
            return await inner[identity.domain](request, context, identity)

        tracer = domains[""].tracer
        return call if tracer is None else tracer.traced(verb, call)

    max_ops = domains[""].settings.max_ops
    methods: dict[str, Any] = {}
    for verb, rpc in unary.RPCS.items():
        name = rpc.path.rpartition("/")[2]
        methods[name] = grpc.unary_unary_rpc_method_handler(
            gated(verb, rpc.response),
            request_deserializer=reader(rpc.request),
            response_serializer=_serialized,
        )

    async def session(request_iterator: Any, context: Any) -> None:
        identity, handlers = await admit(context, "attach")
        await SessionStream(handlers, context, identity).serve()

    methods["Session"] = grpc.stream_stream_rpc_method_handler(
        session,
        request_deserializer=reader(pb.OpBatch, max_ops),
        response_serializer=pb.OpResults.SerializeToString,
    )

    async def watching(request: Any, context: Any) -> None:
        identity, handlers = await admit(context, "watch")
        await watch(handlers, handlers.events, identity, request, context, refuse)

    methods["Watch"] = grpc.unary_stream_rpc_method_handler(
        watching,
        request_deserializer=reader(pb.WatchRequest),
        response_serializer=pb.WatchResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(unary.SERVICE, methods)


def _serve(
    handlers: Handlers, verb: str, response_class: Any
) -> Callable[[Any, Any, Identity], Awaitable[Any]]:
    if verb == "attach":

        async def attach(request: Any, context: Any, identity: Identity) -> Any:
            began = clock()
            response = response_class()
            try:
                _check(request)
                asker: Asker = Visitor(identity)
                if request.worker_key:
                    asker = handlers.workers.find(request.worker_key, identity)
                attached = handlers.attach(asker, request, None)
                _note_proof(attached.worker)
                handlers.write_attach(attached, response)
            except CacheError as error:
                handlers.latency.refuse(verb, error)
                await refuse(context, error)
            handlers.deliveries.settle()
            handlers.latency.took(handlers.latency.rows[verb], clock() - began)
            return response

        return attach

    handler, write = handlers.verbs[verb]
    find, settle = handlers.workers.find, handlers.deliveries.settle
    optional = verb in _LOOKS
    latency, unread = handlers.latency, handlers.unread
    row = latency.rows[verb]
    may_be_large, is_long = verb in _LARGE, verb in _LONG

    async def serve(
        request: Any, context: Any, identity: Identity, handing: Handing | None = None
    ) -> Any:
        began = clock()
        try:
            _check(request)
            if may_be_large:
                let_go = await unread.room(identity.tenant or "", is_long=is_long)
                if let_go is not None:
                    context.add_done_callback(lambda _: let_go())
            asker: Asker
            if optional and (verb in _ABOUT_ALL or not request.worker_key):
                asker = Visitor(identity)
            else:
                asker = find(request.worker_key, identity)
                _note_proof(asker)
                if (steps := handlers.clear_way(asker, verb, request)) is not None:
                    await handlers.turns.run(steps, identity.tenant or "")
                    asker = find(request.worker_key, identity)
            asked = question(asker.key, verb, request) if isinstance(asker, Worker) else None
            if handing is not None:
                assert isinstance(asker, Worker)
                handing.begin(asker, verb, request.request_id)
            if asked is not None:
                assert isinstance(asker, Worker)
                if (earlier := handlers.earlier(asker, asked)) is not None:
                    return _counted(unread, identity, context, earlier)
            answer = handler(asker, request)
            if answer.__class__ is Waiting:
                assert isinstance(asker, Worker)
                # Before what has settled is delivered.
                answer = _Call(handlers, asker, answer, handing)
            elif handing is not None:
                handing.note_answer(answer)
            settle()
            latency.took(row, clock() - began)
            if answer.__class__ is _Call:
                answer = await answer.outcome()
            elif answer.__class__ is GeneratorType:
                answer = await handlers.turns.run(answer, identity.tenant or "")
                settle()
        except CacheError as error:
            latency.refuse(verb, error)
            await refuse(context, error)
        response = response_class()
        writing = write(answer, response)
        if writing.__class__ is GeneratorType:
            answer = None  # who writes it frees it, a part at a time
            writing = in_pieces(writing, response)
            response = await handlers.turns.run(writing, identity.tenant or "") or response
        if asked is not None:
            handlers.keep(asker, asked, response)
        return _counted(unread, identity, context, response)

    if verb not in _HANDS_OUT:
        return serve

    async def hand_out(request: Any, context: Any, identity: Identity) -> Any:
        with Handing(handlers) as handing:
            response = await serve(request, context, identity, handing)
            await handing.told(context)
        return response

    return hand_out


def _counted(unread: Unread, identity: Identity, context: Any, answer: Any) -> Any:
    """Count an answer as unread until its call has ended."""
    size = len(answer) if answer.__class__ is bytes else answer.ByteSize()
    if (let_go := unread.hold(identity.tenant or "", size)) is not None:
        context.add_done_callback(lambda _: let_go())
    return answer


def _note_proof(worker: Worker) -> None:
    """Remember what the caller of a worker's calls showed last: without it, it ends."""
    if (standing := STANDING.get()) is not None:
        worker.proof = standing.proof


def _serialized(answer: Any) -> bytes:
    done: bytes = answer if answer.__class__ is bytes else answer.SerializeToString()
    return done


def _check(request: Any) -> None:
    if request.__class__ is BadRequest:
        raise InvalidRequest(request)


class _Call:
    """A call that waits for the outcome of a ticket.

    Its caller may hang up at any moment: while the ticket waits, when its outcome has been
    delivered and nobody has looked yet, or between the two.  Who is granted a lease that nobody is
    told of is `handing`'s business.
    """

    __slots__ = ("_future", "_handing", "_handlers", "_id", "_is_settled", "_worker")

    def __init__(
        self, handlers: Handlers, worker: Worker, waiting: Waiting, handing: Handing | None
    ) -> None:
        self._handlers = handlers
        self._handing = handing
        self._worker = worker
        self._id = -next(_calls)  # below zero: never the id of a session's op
        self._future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._is_settled = False
        worker.tickets[self._id] = waiting.ticket
        handlers.deliveries.enter(waiting.ticket, self._deliver)

    async def outcome(self) -> Grant | TableUpdate:
        """Wait for it.

        Raises:
            CacheError: the outcome is one.
        """
        try:
            settled = await self._future
        except asyncio.CancelledError:
            if not self._is_settled:
                self._handlers.cancel_ticket(self._worker, self._id)
                self._handlers.deliveries.settle()
            raise
        if isinstance(settled, CacheError):
            raise settled
        return settled

    def _deliver(self, outcome: Outcome) -> None:
        self._worker.tickets.pop(self._id, None)
        self._is_settled = True
        if self._handing is not None:
            self._handing.note_answer(outcome)
        if not self._future.done():
            self._future.set_result(outcome)


async def refuse(context: Any, error: CacheError) -> Never:
    """End a call with the error's status, and its class and retry hint as details."""
    text = shorten(str(error))
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=unary.ERROR_DOMAIN)
    details = [_any(info)]
    if isinstance(error, PoolExhausted) and error.retry_after_s > 0:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMicroseconds(int(error.retry_after_s * 1e6))
        details.append(_any(retry))
    status = rpc_status.to_status(
        status_pb2.Status(code=codec.STATUS_CODES[error.code], message=text, details=details)
    )
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort always raises")


def shorten(text: str) -> str:
    """Take what is too much out of the middle of an error's text.

    It travels twice in the trailers of a call, each byte that is not ASCII as three; a client takes
    no more than 8 KiB of them, and else would be told of those, and not of the error.

    >>> len(shorten("ü" * 4000).encode()) <= MOST_ERROR_BYTES, shorten("no namespace m")
    (True, 'no namespace m')
    """
    data = text.encode()
    if len(data) <= MOST_ERROR_BYTES:
        return text
    half = MOST_ERROR_BYTES // 2 - 4
    return f"{data[:half].decode(errors='ignore')} … {data[-half:].decode(errors='ignore')}"


def _any(message: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
