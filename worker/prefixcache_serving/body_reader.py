"""A request's body: of so many bytes, within so much time, JSON in UTF-8, and nothing twice.

What all requests together have sent and not yet been answered for is bounded, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, Final

from starlette.types import Receive, Scope

from prefixcache_serving.fields import show
from prefixcache_serving.refusals import Refused

BODY_S: Final = 30.0
"""How long a body may take."""
MOST_BYTES: Final = 64 << 20
"""Of all bodies that are being read or worked on."""


class ClientGone(Exception):
    """The client has left; nobody is to be told anything."""


class BodyReader:
    """Reads bodies.

    Args:
        longest: bytes of one.
        most: bytes of all at a time.
    """

    def __init__(self, longest: int, most: int = MOST_BYTES) -> None:
        self.longest = longest
        self._most = most
        self._held = 0

    @contextlib.asynccontextmanager
    async def reading(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """Read a body; its bytes count until the block is left.

        Raises:
            Refused: it is no JSON by its headers, too long, or does not come.
            ClientGone: the client left.
        """
        headers = dict(scope["headers"])
        _check(headers)
        size = 0
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message.get("body", b"")
                    size += len(part)
                    self._held += len(part)
                    if size > self.longest:
                        raise Refused(
                            f"the body has more than {self.longest:,} bytes",
                            status=413,
                            code="body_too_long",
                        )
                    if self._held > self._most:
                        raise Refused(
                            "too many long requests at once; come again",
                            status=429,
                            code="rate_limit_exceeded",
                            retry_after_s=1.0,
                        )
                    parts.append(part)
                    if not message.get("more_body"):
                        break
            yield b"".join(parts)
        except TimeoutError:
            raise Refused(
                f"the body did not come within {BODY_S:.0f} s", status=408, code="timeout"
            ) from None
        finally:
            self._held -= size


def parse(data: bytes) -> Any:
    """Parse a body.

    Raises:
        Refused: it is no JSON in UTF-8; a name stands twice in an object, of which one would be
            ignored; a number is none.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise Refused("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise Refused(f"the body is no JSON in UTF-8: {error}", code="invalid_json") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise Refused(f"{show(name)} is there twice in one object", code="invalid_json")
            seen.add(name)
    return found


def _refuse_constant(name: str) -> Any:
    raise Refused(f"{name} is no number of JSON", code="invalid_json")


def _check(headers: dict[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        # Without this, a stranger's page in a browser could ask without being asked first.
        raise Refused(
            "send JSON, with the header content-type: application/json",
            status=415,
            code="unsupported_media_type",
        )
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding != b"identity":
        raise Refused(
            "a body in another content-encoding than identity is not read",
            status=415,
            code="unsupported_media_type",
        )
