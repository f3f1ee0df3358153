"""The front: what is behind each path.

```
POST /v1/chat/completions   POST /v1/completions       an answer, whole or as a stream
POST /v1/responses                                     likewise; nothing is stored
GET  /v1/models             GET  /v1/models/{id}
GET  /health                whether requests are answered (no key needed)
GET  /metrics               for Prometheus
GET  /                      the page: a lane per worker, and a box to ask something
GET  /workers               what it shows, once; /workers/live: as it changes
```
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefixcache.errors import CacheError
from prefixcache.plain_json import json_parts, json_text
from prefixcache.service.http.browser_headers import Careful
from prefixcache.service.http.http_connections import KEPT
from prefixcache_serving.answer_form import refused_grammar
from prefixcache_serving.ask import Ask, read_ask
from prefixcache_serving.board import MOST_VIEWERS, Board
from prefixcache_serving.bodies import Bodies, Piece, TokenLogprob
from prefixcache_serving.body_reader import BodyReader, ClientGone, parse
from prefixcache_serving.call_form import CallPiece, CallReader
from prefixcache_serving.fields import CHAT, COMPLETIONS, RESPONSES, show
from prefixcache_serving.front_server import MOST_CONNECTIONS
from prefixcache_serving.journey import Journey
from prefixcache_serving.keys import Keys
from prefixcache_serving.meter import CONTENT_TYPE, Meter
from prefixcache_serving.refusals import Refused, refusal_of
from prefixcache_serving.response_bodies import ResponseBodies
from prefixcache_serving.router import Router
from prefixcache_serving.served_model import ServedModel
from prefixcache_serving.shares import Shares
from prefixcache_worker.text import TextStream

PAGE: Final = Path(__file__).parent / "web"
"""All that a browser needs; nothing of it is secret."""
EXPLAIN: Final = "x-prefixcache-explain"
"""A request with this header is told the ledger of its prompts, and who computed."""
QUIET_S: Final = 15.0
"""After so long without a token a stream is given an empty line: nobody takes it for dead."""
MOST_REQUESTS: Final = MOST_CONNECTIONS - 64
"""For answers, under way at a time; the other connections are for whoever looks how it is."""
_LONGEST_HEADER: Final = 2048
_PIECES_AHEAD: Final = 16
"""Pieces of all answers of a stream that wait to be sent."""
_LONG_BODY: Final = 16 << 10
"""Bytes from which on a body is read beside the event loop."""
_HEAVY: Final = 4096
"""Tokens and log-probabilities from which on an answer is written there, too."""


class Front:
    """The HTTP side of one model.

    Args:
        model: what is served.
        router: who computes.
        keys: who may ask.
        meter: what is counted.
        workers: the names of all workers, also of those that are not there now.
    """

    def __init__(
        self,
        model: ServedModel,
        router: Router,
        keys: Keys,
        meter: Meter,
        *,
        workers: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.router = router
        self.keys = keys
        self.meter = meter
        self.board = Board(router, model.name, workers)
        self.num_open = 0
        """Requests for answers that are under way."""
        self._bodies = BodyReader(model.most_body_bytes, tenants=keys.tenants)
        self._shares = Shares(MOST_REQUESTS, keys.tenants)
        self._viewer_shares = Shares(MOST_VIEWERS, keys.tenants)
        self._open: Counter[str] = Counter()
        """Of these, by tenant, those whose key was seen."""
        self._numbers = count(1)

    def app(self) -> ASGIApp:
        """Give the application."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", _Answers(self, CHAT), methods=["POST"]),
                Route("/v1/completions", _Answers(self, COMPLETIONS), methods=["POST"]),
                Route("/v1/responses", _Answers(self, RESPONSES), methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{id:path}", self._one_model),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/workers", self._workers),
                Route("/workers/live", _Live(self), methods=["GET"]),
                Mount("/page", Careful(StaticFiles(directory=PAGE))),
                Route("/", Careful(_page)),
            ],
            exception_handlers={HTTPException: _as_openai, Refused: _as_openai, Exception: _fault},
        )

    # ------------------------------------------------------------------------------- what is short

    async def _models(self, request: Request) -> Response:
        self._tenant(request.scope)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: Request) -> Response:
        self._tenant(request.scope)
        if (name := request.path_params["id"]) != self.model.name:
            raise Refused(
                f"the model {show(name)} is not served here; {show(self.model.name)} is",
                param="model",
                code="model_not_found",
                status=404,
            )
        return JSONResponse(self._card())

    async def _health(self, request: Request) -> Response:
        if self.router.is_draining:
            return PlainTextResponse("draining\n", 503)
        ready = any(one.is_open for one in self.router.stations.values())
        return PlainTextResponse("serving\n" if ready else "no worker\n", 200 if ready else 503)

    async def _metrics(self, request: Request) -> Response:
        self._tenant(request.scope)
        return Response(self.meter.exposition(), headers={"content-type": CONTENT_TYPE})

    async def _workers(self, request: Request) -> Response:
        return JSONResponse(self.board.state(self._tenant(request.scope)))

    @contextmanager
    def viewing(self, scope: Scope) -> Iterator[str]:
        """Let somebody look at the workers for as long as it reads; give whose it is.

        Raises:
            Refused: its key is none; or too many of its tenant's look.
        """
        tenant = self._tenant(scope)
        viewers = self.board.viewers
        if not self._viewer_shares.room(tenant, viewers):
            raise Refused(
                f"{viewers[tenant]} of your pages are open, and {viewers.total()} of all: no more "
                "can be; close one",
                status=503,
                retry_after_s=10.0,
            )
        with self.board.viewed(tenant):
            yield tenant

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.model.name,
            "object": "model",
            "created": self.model.created,
            "owned_by": "prefixcache",
            "max_model_len": self.model.max_tokens,
        }

    def _tenant(self, scope: Scope) -> str:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self.keys.tenant(given.decode("latin-1"))

    # --------------------------------------------------------------------------------- the answers

    @contextmanager
    def entered(self, scope: Scope) -> Iterator[str]:
        """Let a request in; give whose it is.

        Raises:
            Refused: its key is none; or too many of its tenant's are under way.
        """
        tenant = self._tenant(scope)
        if not self._shares.room(tenant, self._open):
            raise Refused(
                f"{self._open[tenant]} of your requests are under way, and {self.num_open} of all: "
                "no more can be; come again later",
                code="rate_limit_exceeded",
                status=429,
                retry_after_s=1.0,
            )
        self._open[tenant] += 1
        scope[KEPT] = True
        try:
            yield tenant
        finally:
            self._open[tenant] -= 1

    async def ask(
        self, kind: str, tenant: str, scope: Scope, receive: Receive
    ) -> tuple[Ask, list[Journey]]:
        """Read a request and hand its answers to the router.

        Raises:
            Refused: with what is wrong.
            ClientGone: the client left.
        """
        async with self._bodies.reading(scope, receive, tenant) as data:
            if len(data) < _LONG_BODY:
                asked = read_ask(parse(data), kind, self.model, tenant)
            else:
                asked = await asyncio.to_thread(
                    lambda: replace(read_ask(parse(data), kind, self.model, tenant), is_long=True)
                )
        stop_ids = frozenset() if asked.ignore_eos else self.model.stop_ids
        journeys = [
            Journey(f"r{next(self._numbers)}", line, stop_ids, tenant) for line in asked.lines()
        ]
        if waiting := [journey for journey in journeys if not journey.is_over]:
            self.router.admit(waiting)
        return asked, journeys

    async def pieces(
        self, ask: Ask, journeys: Sequence[Journey]
    ) -> AsyncGenerator[Piece | None, None]:
        """Give the pieces of all answers as they come; None after each `QUIET_S` without one.

        Raises:
            Refused: one of them failed.
        """
        ready: asyncio.Queue[Piece | Refused] = asyncio.Queue(_PIECES_AHEAD)
        tasks = [
            asyncio.create_task(
                self._tell(ask, index, journey, journeys[index - index % ask.num_tries], ready)
                if ask.search is None
                else self._tell_found(ask, index, journey, ready)
            )
            for index, journey in enumerate(journeys)
        ]
        left = len(ask.prompts) * ask.num_choices
        try:
            while left:
                try:
                    piece = await asyncio.wait_for(ready.get(), QUIET_S)
                except TimeoutError:
                    yield None
                    continue
                if isinstance(piece, Refused):
                    raise piece
                left -= piece.reason is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell(
        self,
        ask: Ask,
        index: int,
        journey: Journey,
        first: Journey,
        ready: asyncio.Queue[Piece | Refused],
    ) -> None:
        """Turn one answer's tokens into pieces, at the pace at which they are taken.

        The first answer to a prompt tells, for the others too, how likely the prompt is.
        """
        stream = TextStream(
            self.model.tokenizer,
            ask.stop,
            ask.how.get("min_tokens", 0),
            shows_special=ask.use is not None,  # what calls are written with may be some of these
        )
        reader, trigger = None, None
        if ask.use is not None:
            trigger = self.model.trigger_token
            reader = CallReader(ask.calls, ask.use.must_call, trigger is not None)
        unseen = journey.stop_ids if reader is None else self.model.stop_ids
        num_told = offset = 0
        try:
            if ask.echoes is not None:
                echo = ask.echoes[index // ask.num_tries]
                offset = len(echo)
                scores: tuple[TokenLogprob, ...] = ()
                if ask.scores_prompts:
                    await first.read_scores()
                    scores = await asyncio.to_thread(self._echoed, first)
                await ready.put(Piece(index, echo, 0, logprobs=scores))
            while True:
                tokens, reason = await journey.read()
                self.router.has_read(journey)
                said, text, used = "", "", 0
                told: list[TokenLogprob] = []
                for token in tokens:
                    at = offset + len(stream.text)
                    is_shown = token not in unseen
                    if reader is not None and token == trigger and reader.is_text:
                        said, _ = reader.push(text + stream.skip(token))
                        text = ""
                        reader.open()
                    elif is_shown:
                        text += stream.push(token)
                    # Beside an echo it is counted which tokens are the answer's: all are told.
                    if journey.logprobs and (is_shown or ask.echoes is not None):
                        told.append(TokenLogprob(token, *journey.logprobs[num_told + used], at))
                    used += 1
                    if stream.stopped:
                        reason = "stop"
                        self.router.leave(journey)
                        break
                if reason:
                    text += stream.finish()
                num_told += used
                calls: list[CallPiece] = []
                if reader is not None:
                    text, calls = reader.push(text)
                    text = said + text
                    if reason:
                        text += reader.finish()
                    if reason == "stop" and reader.num_calls:
                        reason = "tool_calls"
                if used or reason:
                    piece = Piece(index, text, used, reason or None, tuple(told), tuple(calls))
                    await ready.put(piece)
                if reason:
                    return
        except Refused as refusal:
            if ask.grammar is not None and str(refusal).startswith("grammar"):
                refusal = refused_grammar(refusal, ask.form, ask.form_field)
            await ready.put(refusal)
        except Exception:
            # Who waits for the rest of the answer must not wait for ever.
            await ready.put(Refused("a fault of ours", status=500, code="internal_error"))
            raise

    async def _tell_found(
        self, ask: Ask, index: int, journey: Journey, ready: asyncio.Queue[Piece | Refused]
    ) -> None:
        """Tell the answers of a search, which come at its end, all at once."""
        try:
            await journey.read()
            if len(journey.beams) < ask.num_answers:
                raise Refused("the worker found too few answers", status=500, code="worker_failed")
            for number, found in enumerate(journey.beams):
                stream = TextStream(self.model.tokenizer)
                tokens = [int(token) for token in found["tokens"]]
                shown = [token for token in tokens if token not in journey.stop_ids]
                text = "".join(map(stream.push, shown)) + stream.finish()
                place = index * ask.num_answers + number
                await ready.put(Piece(place, text, len(tokens), str(found["reason"])))
        except Refused as refusal:
            await ready.put(refusal)

    def _echoed(self, journey: Journey) -> tuple[TokenLogprob, ...]:
        """Give the log-probabilities of a prompt; of its first token there is none.  O(tokens)."""
        stream = TextStream(self.model.tokenizer)
        told: list[TokenLogprob] = []
        for token, (logprob, top) in zip(
            journey.line["tokens"], [(None, None), *journey.scores], strict=True
        ):
            told.append(TokenLogprob(token, logprob, top, len(stream.text)))
            stream.push(token)
        return tuple(told)


class _Live:
    """The stream of one page that is open."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve it until the viewer goes, or refuse it."""
        kind = "text/event-stream"
        with self._front.viewing(scope) as tenant:
            answer = Response(media_type=kind)
            if scope["method"] != "HEAD":
                answer = StreamingResponse(self._front.board.live(tenant), media_type=kind)
            await answer(scope, receive, send)


class _Answers:
    """One of the paths that answer."""

    def __init__(self, front: Front, kind: str) -> None:
        self._front = front
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, until it is done or the client leaves."""
        front = self._front
        front.num_open += 1
        status = 500
        try:
            with front.entered(scope) as tenant:
                ask, journeys = await front.ask(self._kind, tenant, scope, receive)
                status = await self._answer(ask, journeys, scope, receive, send)
        except ClientGone:
            status = 499
            front.meter.gone.inc()
        except CacheError as error:
            refusal = refusal_of(error)
            status = refusal.status
            await JSONResponse(refusal.body, status, refusal.headers)(scope, receive, send)
        finally:
            front.num_open -= 1
            front.meter.answered.labels(self._kind, str(status)).inc()

    async def _answer(
        self, ask: Ask, journeys: list[Journey], scope: Scope, receive: Receive, send: Send
    ) -> int:
        """Send the answer; what is under way ends as soon as the client leaves."""
        told = asyncio.create_task(self._send(ask, journeys, scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({told, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not told.done():
                raise ClientGone
            return told.result()
        finally:
            self._front.router.leave(*journeys)
            told.cancel()
            gone.cancel()
            await asyncio.gather(told, gone, return_exceptions=True)

    async def _send(
        self, ask: Ask, journeys: list[Journey], scope: Scope, receive: Receive, send: Send
    ) -> int:
        began_s = time.monotonic()
        front = self._front
        made = ResponseBodies if ask.kind == RESPONSES else Bodies
        bodies = made(ask, front.model, explains=EXPLAIN.encode() in dict(scope["headers"]))
        headers = {"x-request-id": bodies.id} | _left_out(ask, ())
        stream = _Stream(send, headers)
        weight = 0
        async with aclosing(front.pieces(ask, journeys)) as pieces:
            is_first = True
            try:
                async for piece in pieces:
                    if piece is None:
                        if ask.stream:
                            await stream.blank()
                        continue
                    weight += piece.weight
                    is_heavy = (weight if piece.reason else piece.weight) > _HEAVY
                    if is_first:
                        headers |= _left_out(ask, journeys)
                        front.meter.first_s.observe(time.monotonic() - began_s)
                        is_first = False
                        is_heavy = is_heavy or ask.is_long
                    written = partial(_taken, bodies, piece, is_heavy)
                    for data in await asyncio.to_thread(written) if is_heavy else written():
                        await stream.write(data)
            except Refused as refusal:
                if not stream.has_begun:
                    raise
                for event in bodies.failure(refusal):
                    await stream.write(_event(event))
                await stream.end()
                return refusal.status
        is_heavy = weight > _HEAVY or ask.is_long
        if not ask.stream:
            whole = partial(_whole, bodies, journeys, is_heavy)
            data = await asyncio.to_thread(whole) if is_heavy else whole()
            answer = Response(data, headers=headers, media_type="application/json")
            await answer(scope, receive, send)
            return 200
        last = partial(_last, bodies, journeys, is_heavy)
        for data in await asyncio.to_thread(last) if is_heavy else last():
            await stream.write(data)
        if bodies.ends_with_done:
            await stream.write(b"data: [DONE]\n\n")
        await stream.end()
        return 200


def _taken(bodies: Bodies | ResponseBodies, piece: Piece, is_heavy: bool) -> list[bytes]:
    """Note a piece; give what of it is sent now."""
    bodies.take(piece)
    if not bodies.ask.stream:
        return []
    return [_event(one, is_heavy) for one in bodies.events(piece)]


def _last(
    bodies: Bodies | ResponseBodies, journeys: Sequence[Journey], is_heavy: bool
) -> list[bytes]:
    return [_event(one, is_heavy) for one in bodies.last(journeys)]


def _whole(bodies: Bodies | ResponseBodies, journeys: Sequence[Journey], is_heavy: bool) -> bytes:
    told = bodies.whole(journeys)
    return _written(told, is_heavy, ensure_ascii=False, separators=(",", ":")).encode()


def _event(value: dict[str, Any], is_heavy: bool = False) -> bytes:
    """Write an event of a stream, by its type if it has one."""
    name = f"event: {value['type']}\n" if "type" in value else ""
    return f"{name}data: {_written(value, is_heavy)}\n\n".encode()


def _written(value: dict[str, Any], is_heavy: bool, **options: Any) -> str:
    """Write JSON; what is heavy in parts, so that others have their turn in between."""
    return "".join(json_parts(value, **options)) if is_heavy else json_text(value, **options)


class _Stream:
    """Server-sent events.

    The status is sent with the first one: what fails before has a status of its own.
    """

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        self._send = send
        self._told = headers
        """Read when the first one is sent."""
        self._more = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
        }
        self.has_begun = False

    async def blank(self) -> None:
        """Say that there is nothing to say.

        A comment would do by the book, but there are readers that take what comes behind it for a
        part of it (vLLM's benchmark: such an answer counts as failed).
        """
        await self.write(b"\n")

    async def end(self) -> None:
        """End, without a word."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def write(self, data: bytes) -> None:
        """Send what was written of some; returns when its reader has room for it."""
        if not self.has_begun:
            self.has_begun = True
            told = self._told | self._more
            headers = [(key.encode(), value.encode("latin-1")) for key, value in told.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})


async def _page(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["method"] not in ("GET", "HEAD"):
        raise HTTPException(405)
    await FileResponse(PAGE / "index.html")(scope, receive, send)


def _left_out(ask: Ask, journeys: Sequence[Journey]) -> dict[str, str]:
    """Give the header that says what of a request has no effect."""
    parts = sorted({*ask.left_out, *(part for one in journeys for part in one.left_out)})
    told = ascii(", ".join(parts))[1:-1]  # a schema's words are anybody's, and may be many
    if len(told) > _LONGEST_HEADER:
        told = f"{told[:_LONGEST_HEADER]} ..."
    return {"x-prefixcache-left-out": told} if parts else {}


async def _gone(receive: Receive) -> None:
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return


async def _as_openai(request: Request, error: Exception) -> Response:
    more: dict[str, str] = {}
    if isinstance(error, HTTPException):
        more = dict(error.headers or {})
        what = "no such path" if error.status_code == 404 else str(error.detail)
        if taken := more.get("Allow"):
            what = f"this path takes {taken}"
        error = Refused(
            f"{what}: {request.method} {show(request.url.path)}",
            status=error.status_code,
            code="unknown_url" if error.status_code == 404 else None,
        )
    assert isinstance(error, Refused)
    return JSONResponse(error.body, error.status, more | error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    told = Refused("a fault of ours; it is in the log", status=500, code="internal_error")
    return JSONResponse(told.body, 500)
