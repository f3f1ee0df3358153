"""`prefixcache chat`: talk to an endpoint in the terminal, and see what each answer cost."""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from prefixcache.bounded_files import read_file
from prefixcache.cli.front import KEY_VARIABLE, FrontConnection, read_front_address, read_key
from prefixcache.client.address import Address
from prefixcache.errors import CacheError, InvalidRequest, ServiceUnavailable
from prefixcache.plain_json import json_text
from prefixcache.private_files import check_secret
from prefixcache.texts import escape
from prefixcache_serving.front import EXPLAIN

_TIMEOUT_S: Final = 600.0
_LONGEST_KEYS: Final = 1 << 20
_LONGEST: Final = 1 << 24
"""Bytes of an answer that is not streamed, or of a line of one that is."""
_NO_ANSWER: Final = (
    *(OSError, http.client.HTTPException),
    *(ValueError, LookupError, TypeError, AttributeError),
)
"""What may come of asking, where somebody else may listen."""


def chat(
    http: Annotated[
        str, typer.Option("--http", metavar="ADDRESS", help="Of `prefixcache up`.")
    ] = "127.0.0.1:8000",
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Default: the one that is served.")
    ] = "",
    system: Annotated[str, typer.Option(metavar="TEXT", help="What it is told first.")] = "",
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: the most likely.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Whose first word is the API key. Default: $OPENAI_API_KEY.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Talk to a served model; each answer says what was cached, who computed, how long it took.

    Ctrl-C ends an answer, or, where none is being given, the chat; so does the end of the input.

    Example: prefixcache chat --system "You are brief."
    """
    endpoint = Endpoint(read_front_address(http), _key(key_file))
    name = model or endpoint.model()
    messages = [{"role": "system", "content": system}] if system else []
    while (said := _ask()) is not None:
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        body = {
            "model": name,
            "messages": messages,
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        try:
            text = _show(endpoint.stream(body))
        except (InvalidRequest, ServiceUnavailable) as error:
            # The chat is here: it can be asked again.
            typer.echo(f"\n{escape(str(error))}", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": text})


class Endpoint:
    """Where requests go.

    Args:
        address: of the front.
        key: that is shown; empty: none.
    """

    def __init__(self, address: Address, key: str) -> None:
        self._address = address
        self._headers = {"content-type": "application/json", EXPLAIN: "1"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"

    def model(self) -> str:
        """Ask what is served.

        Raises:
            ServiceUnavailable: nobody answers.
            InvalidRequest: it is refused, with why.
        """
        connection, answer = self._request("GET", "/v1/models", None)
        try:
            return str(json.loads(answer.read(_LONGEST))["data"][0]["id"])
        except _NO_ANSWER as error:
            raise self._absent(error) from None
        finally:
            connection.close()

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Give the chunks of an answer; whoever stops taking them ends it.

        Raises:
            ServiceUnavailable: nobody answers.
            InvalidRequest: it is refused, or cannot go on, with why.
        """
        more = {"stream": True, "stream_options": {"include_usage": True}}
        connection, answer = self._request("POST", "/v1/chat/completions", body | more)
        try:
            while (line := answer.readline(_LONGEST)) != b"data: [DONE]\n":
                if not line:
                    raise ServiceUnavailable("the answer broke off")
                if line.startswith(b"data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise InvalidRequest(_text(chunk["error"]["message"]))
                    _check(chunk)
                    yield chunk
        except _NO_ANSWER as error:
            raise ServiceUnavailable(
                f"the answer broke off ({error or type(error).__name__})"
            ) from None
        finally:
            connection.close()

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = FrontConnection(self._address, _TIMEOUT_S)
        try:
            data = None if body is None else json_text(body)
            connection.request(method, path, data, self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                told = json.loads(answer.read(_LONGEST))
                raise InvalidRequest(_text(told["error"]["message"]))
        except _NO_ANSWER as error:
            connection.close()
            raise self._absent(error) from None
        except CacheError:
            connection.close()
            raise
        return connection, answer

    def _absent(self, error: Exception) -> ServiceUnavailable:
        why = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return ServiceUnavailable(
            f"no endpoint answers at {self._address} ({why}); start one with: prefixcache up"
        )


def _check(chunk: dict[str, Any]) -> None:
    """See that all is there that is shown of a chunk.

    Raises:
        TypeError, LookupError, AttributeError, ValueError: it is not.
    """
    for choice in chunk["choices"]:
        _text(choice["delta"].get("content") or "")
    if chunk.get("usage"):
        summary(chunk, 0.0)


def _text(given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError("there is no text where one should be")
    return given


def summary(chunk: dict[str, Any], seconds: float) -> str:
    """Say what an answer cost, by the chunk that tells its usage.

    >>> usage = {"prompt_tokens": 984, "completion_tokens": 7}
    >>> usage["prompt_tokens_details"] = {"cached_tokens": 983}
    >>> summary({"usage": usage, "prefixcache": [{"workers": ["w1", "w2"]}]}, 0.5)
    'cached 983 of 984 · 7 tokens · w1, then w2 · 0.50 s'
    """
    usage = chunk["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    workers = [", then ".join(one["workers"]) for one in chunk.get("prefixcache", [])]
    parts = [
        f"cached {cached:,} of {usage['prompt_tokens']:,}",
        f"{usage['completion_tokens']:,} tokens",
        *workers,
        f"{seconds:.2f} s",
    ]
    return " · ".join(parts)


def _ask() -> str | None:
    """Read what is said next; None: nothing any more."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _show(chunks: Iterator[dict[str, Any]]) -> str:
    """Write an answer as it comes, and what it cost; give its text."""
    began_s = time.monotonic()
    text = ""
    try:
        for chunk in chunks:
            for choice in chunk["choices"]:
                part = choice["delta"].get("content") or ""
                text += part
                typer.echo("\n".join(map(escape, part.split("\n"))), nl=False)
            if chunk.get("usage"):
                typer.echo(f"\n[{summary(chunk, time.monotonic() - began_s)}]")
    except KeyboardInterrupt:
        typer.echo("\n[ended]")
    return text


def _key(path: Path | None) -> str:
    if path is None:
        return read_key(os.environ.get(KEY_VARIABLE, ""), f"${KEY_VARIABLE}")
    check_secret(path, "--key-file")
    words = read_file(path, _LONGEST_KEYS).decode("utf-8", "replace").split()
    if not words:
        raise InvalidRequest(f"--key-file {path} is empty")
    return read_key(words[0], f"--key-file {path}")
