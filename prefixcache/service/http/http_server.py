"""HTTP on loopback: the metrics, and what a browser shows.  Off unless `--http` is given.

It runs on the event loop that serves the workers, so nothing here may be long: what is large is
made in steps that give the loop back.  Reading only: GET and HEAD are all there is.

**Who may read.**  There is no authentication, so it listens on the loopback device and nowhere
else; every user of this machine can read it.  A browser could still be talked into reading it for
a stranger's page: a name of the attacker's that resolves to 127.0.0.1 (DNS rebinding) makes it the
same origin.  Such a request names that host, so only our own names are answered.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefixcache.client.address import Address
from prefixcache.client.credentials import is_loopback
from prefixcache.errors import InvalidRequest, ServiceUnavailable
from prefixcache.service.handlers import Handlers
from prefixcache.service.http.browser_headers import Careful
from prefixcache.service.http.dashboard import Dashboard
from prefixcache.service.http.embedded_server import EmbeddedServer, own_names
from prefixcache.service.http.http_connections import Bound
from prefixcache.service.http.metrics import CONTENT_TYPE, Scrape, exposition
from prefixcache.service.http.throttle import Throttle

ASSETS = Path(__file__).parent / "web"
"""The page: all that a browser needs, in the package."""

_BACKLOG = 32
_IN_LINE = 4
"""Times as many as there may be connections."""
_LAST_PORT = 65_535
_LAST_WORDS_S = 1
_LOOK_EVERY_S = 0.25
_PRESSED_S = 0.02
"""How often newcomers are counted; the second while there are more than there may be."""


def read_address(target: str) -> Address:
    """Read where the page is shown.

    Raises:
        InvalidRequest: it is no address for a browser, or other machines could reach it.
    """
    said = f"--http {target!a}: "
    if target.startswith("unix:") or "/" in target:
        raise InvalidRequest(
            f"{said}the page is for browsers, which open neither sockets nor paths; write "
            "127.0.0.1:PORT"
        )
    host, colon, port = target.rpartition(":")
    if not colon:
        port_named = target if _is_port(target) else "8080"
        raise InvalidRequest(f"{said}the host is missing; write 127.0.0.1:{port_named}")
    if not _is_port(port):
        raise InvalidRequest(
            f"{said}{port[:20]!a} is no port; write 127.0.0.1:PORT with a number from 0 to 65535 "
            "(0: any that is free)"
        )
    if host and not is_loopback(host.removeprefix("[").removesuffix("]")):
        raise InvalidRequest(
            f"{said}the page asks nobody who he is, so it is shown on this machine only; write "
            f"127.0.0.1:{int(port)}, and from another machine go through ssh -L"
        )
    return Address.parse(target)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text[:6]) <= _LAST_PORT


class HttpServer:
    """The HTTP side of one service.

    Args:
        target: 127.0.0.1:PORT; port 0 takes a free one.
        domains: the state of each trust domain; the page shows the one without a name.
        max_connections: how many there may be; half of them may be open pages, the rest are for
            whoever reads the metrics.

    Raises:
        InvalidRequest: the address is none, or not on the loopback device.
    """

    def __init__(
        self, target: str, domains: Mapping[str, Handlers], max_connections: int = 64
    ) -> None:
        self._address = read_address(target)
        self._scrape = Scrape(domains)
        self._handlers = domains[""]
        self._dashboard = Dashboard(domains[""])
        self._bound = Bound(max_connections, hurried_go=True)
        self._server: EmbeddedServer | None = None
        self._patrol: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Begin to answer; give the URL.

        Raises:
            ServiceUnavailable: the address cannot be had.
        """
        address = self._address
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        try:
            listening = socket.create_server(
                (address.host, address.port), family=family, backlog=_BACKLOG
            )
        except OSError as error:
            raise ServiceUnavailable(
                f"cannot listen for HTTP at {address}: {error.strerror}"
            ) from None
        port = listening.getsockname()[1]
        # Those who were hung up on stand in the line until their turn, which takes no time.
        throttle = Throttle(_IN_LINE * self._bound.limit)
        app = Guard(Starlette(routes=self._routes()), port, throttle)
        self._server = EmbeddedServer(
            app, self._bound, backlog=_BACKLOG, last_words_s=_LAST_WORDS_S
        )
        failures = self._handlers.failures
        failures.watch(self._server.begin(listening), "what answers for the page")
        self._bound.newcomers.add(listening.fileno())
        self._patrol = asyncio.create_task(self._look())
        failures.watch(self._patrol, "who counts the connections to the page")
        return f"http://{Address(host=address.host, port=port)}"

    async def close(self) -> None:
        """Stop answering.  Idempotent."""
        if self._server is None:
            return
        self._dashboard.close()
        await self._server.close()
        if self._patrol is not None:
            self._patrol.cancel()
        self._server = self._patrol = None

    async def _look(self) -> None:
        while True:
            is_pressed = self._bound.newcomers.pace()
            await asyncio.sleep(_PRESSED_S if is_pressed else _LOOK_EVERY_S)

    def _routes(self) -> list[BaseRoute]:
        page = self._dashboard

        async def metrics(request: Request) -> Response:
            return Response(await exposition(self._scrape), headers={"content-type": CONTENT_TYPE})

        async def history(request: Request) -> Response:
            return Response(page.history(), media_type="application/json")

        async def healthz(request: Request) -> Response:
            if self._handlers.draining:
                return PlainTextResponse("draining\n", 503)
            return PlainTextResponse("serving\n")

        return [
            Route("/healthz", healthz),
            Route("/metrics", metrics),
            Route("/history", history),
            Route("/live", _Live(page, self._bound.limit // 2)),
            Mount("/", StaticFiles(directory=ASSETS, html=True)),
        ]


class _Live:
    """The stream of one page that is open: so many and no more, so that others are answered too."""

    def __init__(self, page: Dashboard, max_viewers: int) -> None:
        self._dashboard = page
        self._max_viewers = max_viewers
        self._viewers = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve it until the viewer goes, or refuse it."""
        if scope["method"] == "HEAD":
            await Response(media_type="text/event-stream")(scope, receive, send)
            return
        if self._viewers >= self._max_viewers:
            told = f"{self._viewers} pages are open, and no more can be: close one\n"
            refusal = PlainTextResponse(told, 503, {"retry-after": "10"})
            await refusal(scope, receive, send)
            return
        self._viewers += 1
        try:
            stream = StreamingResponse(self._dashboard.live(), media_type="text/event-stream")
            await stream(scope, receive, send)
        finally:
            self._viewers -= 1


class Guard:
    """Answers only our own names and only questions, in turn; tells browsers to be careful."""

    def __init__(self, app: ASGIApp, port: int, throttle: Throttle) -> None:
        self._app = Careful(app)
        self._throttle = throttle
        self._hosts = own_names(port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        if headers.get(b"host", b"").lower() not in self._hosts:
            answer = PlainTextResponse("this host name is not served here\n", 421)
            await answer(scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD"):
            answer = PlainTextResponse("this page is for reading\n", 405, {"allow": "GET, HEAD"})
            await answer(scope, receive, send)
            return
        if b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0":
            answer = PlainTextResponse("a question has no body here\n", 413)
            await answer(scope, receive, send)
            return
        if scope["path"] == "/live":
            await self._app(scope, receive, send)
            return
        if self._throttle.is_full:
            told = "too many ask at the same time: come again in a second\n"
            await PlainTextResponse(told, 503, {"retry-after": "1"})(scope, receive, send)
            return
        made: list[Message] = []

        async def keep(message: Message) -> None:
            made.append(message)

        async with self._throttle.turn():
            if (await receive())["type"] == "http.disconnect":
                return
            await self._app(scope, receive, keep)
        for message in made:  # who reads slowly holds up himself, not who is next
            await send(message)
