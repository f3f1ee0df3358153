"""Admission: who may occupy the service with a call, before a byte of it is read.

```
headers ─► who is it? ─┬─ proven ──► a place among --max-calls, of its tenant's share ─► the call
                       ├─ unproven, Health/Check ──► one of a few places, for a few seconds
                       └─ unproven, all else ──────► UNAUTHENTICATED, at once
```
It stands before every service of a server, and before what no service knows, so nothing is answered
without proof because somebody forgot to ask.

gRPC reads a unary call's message before it calls the handler, and would wait for it as long as the
caller likes: so here every call is a stream to gRPC (on the wire there is no difference), and the
message is read with a time limit once its caller is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from inspect import isasyncgen
from typing import Any

import grpc
import grpc.aio

from prefixcache.core.shares import Shares
from prefixcache.errors import CacheError, PoolExhausted, Unauthenticated
from prefixcache.service.auth.authenticator import Authenticator, IdentityFile
from prefixcache.service.auth.connections import Connections
from prefixcache.service.auth.identity import Identities
from prefixcache.service.auth.standing import STANDING, OpenCalls, Standing
from prefixcache.service.auth.unproven_calls import UnprovenCalls

CHECK = "/grpc.health.v1.Health/Check"
"""All that is answered without proof: load balancers have none."""

_CHECKS = 16
"""Health checks at the same time."""
_CHECK_S = 5.0
_MESSAGE_S = 10.0
"""How long a caller may take to send the one message of a call."""

Refuse = Callable[[Any, CacheError], Awaitable[Any]]


class Places:
    """How many calls there are, all endpoints of a service together.

    Args:
        identity_file: Whose tenants have a share each.
        max_calls: How many there may be.
        connections: Those that they come over.
    """

    def __init__(
        self, identity_file: IdentityFile, max_calls: int, connections: Connections
    ) -> None:
        self._identity_file = identity_file
        self._known: Identities | None = None
        self.calls = Shares(max_calls, "--max-calls", "calls")
        self.refused = UnprovenCalls(connections)
        self.checks = UnprovenCalls(connections)
        self.num_checks = 0

    def take(self, tenant: str) -> None:
        """Take a place for a call of a proven caller.  O(1), but when the file has changed.

        Raises:
            PoolExhausted: its tenant has as many as it may.
        """
        current = self._identity_file.current
        if current is not self._known and current is not None:
            self._known = current
            self.calls.set_tenants(current.tenants)
        self.calls.take(tenant)


class Admission(grpc.aio.ServerInterceptor):
    """Stands before all services of one server.

    Args:
        authenticator: Tells who calls.
        places: What is counted for all endpoints.
        calls: What is open at all endpoints.
        refuse: Ends a call with an error.
    """

    def __init__(
        self, authenticator: Authenticator, places: Places, calls: OpenCalls, refuse: Refuse
    ) -> None:
        self._authenticator = authenticator
        self._places = places
        self._calls = calls
        self._refuse = refuse

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Give the handler of a call, with the admission before it."""
        handler = await continuation(details) or _UNKNOWN
        admitted = self._check if details.method == CHECK else self._proven

        async def run(_: Any, context: Any) -> None:
            await admitted(handler, context)

        return grpc.stream_stream_rpc_method_handler(
            run, handler.request_deserializer, handler.response_serializer
        )

    async def _proven(self, handler: Any, context: Any) -> None:
        try:
            standing = Standing(self._authenticator, context)
            tenant = standing.identity.tenant or ""
            self._places.take(tenant)
        except Unauthenticated as error:
            if not self._places.refused.allow(context.peer()):
                return _drop(context)
            await self._refuse(context, error)
        except CacheError as error:
            await self._refuse(context, error)
        task = asyncio.current_task()
        assert task is not None
        try:
            if handler.response_streaming:
                # A call that is cancelled while its first answer carries the metadata cannot be
                # given a status any more: gRPC would send the metadata a second time, and fail.
                await context.send_initial_metadata(())
            standing.begin(task)
            STANDING.set(standing)
            self._calls.add(standing)
            await _serve(handler, context, _MESSAGE_S, standing.settle)
        except Unauthenticated as error:
            await self._refuse(context, error)
        except asyncio.CancelledError:
            if standing.error is None:
                raise  # its caller hung up
            task.uncancel()
            await self._refuse(context, standing.error)
        finally:
            self._calls.remove(standing)
            self._places.calls.give(tenant)

    async def _check(self, handler: Any, context: Any) -> None:
        places = self._places
        if not places.checks.allow(context.peer()):
            return _drop(context)
        if places.num_checks >= _CHECKS:
            error = PoolExhausted(f"{_CHECKS} health checks at the same time", retry_after_s=1.0)
            await self._refuse(context, error)
        places.num_checks += 1
        try:
            await _serve(handler, context, _CHECK_S, lambda: None)
        finally:
            places.num_checks -= 1


def _drop(context: Any) -> None:
    """End a call in the cheapest way: its connection is shut, so that hardly anybody reads it."""
    context.set_code(grpc.StatusCode.UNAVAILABLE)
    context.set_details("too many calls without proof; come again in a second")


async def _answer_unknown(asked: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")


_UNKNOWN: Any = grpc.stream_stream_rpc_method_handler(_answer_unknown)
"""What is called that nobody has: whoever proves himself is told so."""


async def _serve(
    handler: Any, context: Any, message_s: float, settle: Callable[[], object]
) -> None:
    """Run the handler of a call of any kind; `settle` hears when its one answer is made."""
    if handler.request_streaming:
        asked: Any = _messages(context)
    else:
        try:
            asked = await asyncio.wait_for(context.read(), message_s)
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"no message within {message_s:g} s"
            )
        if asked is grpc.aio.EOF:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a call without its message")
    if handler.request_streaming:
        call = handler.stream_stream if handler.response_streaming else handler.stream_unary
    else:
        call = handler.unary_stream if handler.response_streaming else handler.unary_unary
    answer = call(asked, context)
    if isasyncgen(answer):
        async for one in answer:
            await context.write(one)
        return
    answer = await answer
    if not handler.response_streaming:
        settle()
        await context.write(answer)


async def _messages(context: Any) -> Any:
    while (message := await context.read()) is not grpc.aio.EOF:
        yield message
