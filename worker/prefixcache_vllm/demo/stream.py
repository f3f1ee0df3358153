"""Asks an OpenAI-compatible server over HTTP, and hears its answer token by token.

```
POST /v1/completions   prompt: token ids, stream: true   ──►   data: {"choices": [{"token_ids": …
                                                               data: {"usage": {"prompt_tokens_…
                                                               data: [DONE]
```
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any, Final

from prefixcache.plain_json import json_text

HOST: Final = "127.0.0.1"
LAST: Final = b"data: [DONE]"
PATIENCE_S: Final = 900.0
"""A server that says nothing for so long hangs."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event of a stream says."""

    tokens: tuple[int, ...] = ()
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()
    """Of each token: the most probable ones and their logarithms, best first; if asked for."""
    cached: int | None = None
    """Prompt tokens that were not computed: told at the end."""
    end: str = ""
    """Why it ends; empty while it goes on."""


class Refused(Exception):
    """The server does not answer this."""


def completion(prompt: Sequence[int], max_tokens: int, *, num_tops: int = 0) -> dict[str, Any]:
    """Write a greedy request for a stream of token ids.

    >>> completion([1, 2], 8)["stream"]
    True
    """
    asked: dict[str, Any] = {
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if num_tops:
        asked |= {"logprobs": num_tops, "return_tokens_as_token_ids": True}
    return asked


def ask(port: int, request: Mapping[str, Any], request_id: str) -> Iterator[Piece]:
    """Send a request to a server of this machine, and give what it says as it comes.

    Raises:
        Refused: It answers with an error, or in a way that is not understood.
        OSError: It is gone, or ends before the answer does.
    """
    connection = HTTPConnection(HOST, port, timeout=PATIENCE_S)
    try:
        connection.request(
            "POST",
            "/v1/completions",
            json_text(request).encode(),
            {"Content-Type": "application/json", "X-Request-Id": request_id},
        )
        answer = connection.getresponse()
        if answer.status != 200:
            raise Refused(f"{answer.status}: {answer.read(1000).decode(errors='replace')}")
        for line in answer:
            if line.strip() == LAST:
                return
            piece = read_event(line)
            if piece is not None:
                yield piece
        raise ConnectionError("the answer breaks off")  # a server that was killed ends it, no more
    except HTTPException as error:
        raise ConnectionError(f"the answer breaks off: {error!r}") from error
    finally:
        connection.close()


def is_healthy(port: int) -> bool:
    """Whether a server answers there."""
    connection = HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def read_event(line: bytes) -> Piece | None:
    r"""Read one line of a stream; None if it says nothing.

    Raises:
        Refused: It is an error of the server's, or no JSON.

    >>> read_event(b'data: {"choices": [{"token_ids": [7], "finish_reason": null}]}\n').tokens
    (7,)
    >>> read_event(b"data: [DONE]\n"), read_event(b"\n")
    (None, None)
    """
    head, _, text = line.strip().partition(b":")
    text = text.strip()
    if head != b"data" or text == b"[DONE]":
        return None
    try:
        event = json.loads(text)
        if "error" in event:
            raise Refused(str(event["error"]))
        details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
        choices = event.get("choices") or [{}]
        tops = ((choices[0].get("logprobs") or {}).get("top_logprobs")) or ()
        tokens = tuple(int(token) for token in choices[0].get("token_ids") or ())
        return Piece(
            tokens,
            tuple(_read_tops(top, token) for top, token in zip(tops, tokens, strict=False)),
            details.get("cached_tokens"),
            choices[0].get("finish_reason") or "",
        )
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise Refused(f"{error!r} in {text[:200]!r}") from error


def _read_tops(top: Mapping[str, float], chosen: int) -> tuple[tuple[int, float], ...]:
    """Give the best tokens; of equals, the one that was chosen comes first."""
    known = ((int(name.rpartition(":")[2]), float(value)) for name, value in top.items())
    return tuple(sorted(known, key=lambda one: (-one[1], one[0] != chosen)))
