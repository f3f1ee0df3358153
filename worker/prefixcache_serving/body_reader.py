"""A request's body: of so many bytes, within so much time, JSON in UTF-8, and nothing twice.

What all requests together have sent and not yet been answered for is bounded, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from itertools import chain
from typing import Any, Final

from starlette.types import Receive, Scope

from prefixcache.prompts.logged_request import plain_name
from prefixcache_serving.fields import is_text, show
from prefixcache_serving.refusals import Refused
from prefixcache_serving.shares import Shares

BODY_S: Final = 30.0
"""How long a body may take."""
MOST_BYTES: Final = 64 << 20
"""Of all bodies that are being read or worked on."""
DEEPEST: Final = 128
"""Lists and objects that may be in each other: what a body says is gone through, written and told
again by code that may nest once for each of them."""
_HALF: Final = re.compile(rb"\\u[dD][89a-fA-F]")
"""What is written of characters in two halves, of which one may be missing."""


class ClientGone(Exception):
    """The client has left; nobody is to be told anything."""


class BodyReader:
    """Reads bodies.

    Args:
        longest: bytes of one.
        most: bytes of all at a time.
        tenants: who may send them; each has a part of `most` that the others cannot take.
    """

    def __init__(self, longest: int, most: int = MOST_BYTES, tenants: Iterable[str] = ()) -> None:
        self.longest = longest
        self._shares = Shares(most, tenants)
        self._held: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def reading(
        self, scope: Scope, receive: Receive, tenant: str = ""
    ) -> AsyncIterator[bytes]:
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
                    has_room = len(part) <= self._shares.room(tenant, self._held)
                    size += len(part)
                    self._held[tenant] += len(part)
                    if size > self.longest:
                        raise Refused(
                            f"the body has more than {self.longest:,} bytes",
                            status=413,
                            code="body_too_long",
                        )
                    if not has_room:
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
            self._held[tenant] -= size


def parse(data: bytes) -> Any:
    """Parse a body.

    Raises:
        Refused: it is no JSON in UTF-8; a name stands twice in an object, of which one would be
            ignored; a number is none, or beyond all that are; a text holds half a character; it is
            nested too deeply.
    """
    try:
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_number,
        )
        if data.count(b"[") + data.count(b"{") > DEEPEST and _is_deep(found):
            raise RecursionError
        if _HALF.search(data):
            _refuse_halves(found)
        return found
    except RecursionError:
        raise Refused(
            f"the body is nested too deeply: at most {DEEPEST} lists and objects may be in each "
            "other",
            code="invalid_json",
        ) from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise Refused(f"the body is no JSON in UTF-8: {error}", code="invalid_json") from None


def _is_deep(found: Any) -> bool:
    """Whether more than `DEEPEST` lists and objects are in each other.  O(values)."""
    level = [found]
    for _ in range(DEEPEST):
        inside = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for one in chain.from_iterable(inside) if isinstance(one, dict | list)]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise Refused(f"{show(name)} is there twice in one object", code="invalid_json")
            seen.add(name)
    return found


def _number(written: str) -> float:
    value = float(written)
    if not math.isfinite(value):
        raise Refused(f"{show(written)[1:-1]} is beyond every number", code="invalid_json")
    return value


def _refuse_halves(found: Any) -> None:
    """Refuse half a character, wherever it is: it could not be told in any answer."""
    named = found.items() if isinstance(found, dict) else [("the body", found)]
    for name, value in named:
        if not (is_text(name) and _is_whole(value)):
            raise Refused(
                f"{show(name)[1:-1]} holds half a character (U+D800 to U+DFFF): that is no text",
                param=plain_name(name) if is_text(name) and isinstance(found, dict) else None,
                code="invalid_value",
            )


def _is_whole(value: Any) -> bool:
    """Whether no text in it is half of one."""
    if isinstance(value, str):
        return is_text(value)
    if isinstance(value, dict):
        return all(map(is_text, value)) and all(map(_is_whole, value.values()))
    return not isinstance(value, list) or all(map(_is_whole, value))


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
