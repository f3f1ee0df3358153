"""Prompts as users have them: token ids, text, a chat in JSON; from arguments, files or stdin.

```
1 2 3 · [1, 2, 3] · 1,2,3        token ids, with anything but digits between
FILE.bin                         packed little-endian uint32
{"messages": […], "tools": […]}  a request in any form that is logged, through the model's template
any text                         through the model's tokenizer
```
The forms of requests: see `prefixcache.prompts.logged_request`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

from prefixcache.bounded_files import read_file, read_stream
from prefixcache.cli.decoder import Decoder
from prefixcache.cli.streams import say
from prefixcache.errors import InvalidRequest
from prefixcache.plain_json import once_each
from prefixcache.prompts.chat_template import tell
from prefixcache.prompts.logged_request import read_logged
from prefixcache.types import TOKEN_BYTES, pack

OpenDecoder = Callable[[], "Decoder | None"]

_LONGEST = 64 << 20
"""Bytes of a prompt: the longest that the wire carries, written as numbers, has some 45 MiB."""
_SEPARATORS = re.compile(r"[\[\],;\s]+")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?", re.ASCII | re.IGNORECASE)


def read_source(source: str) -> tuple[bytes, str]:
    """Read a file, or stdin for `-`; give its bytes and what to call it.

    Raises:
        InvalidRequest: it cannot be read, or has more than a prompt has.
    """
    if source == "-":
        return read_stream(sys.stdin.buffer, _LONGEST, "stdin"), "stdin"
    return read_file(source, _LONGEST), source


def read_ids(text: str, source: str) -> bytes:
    """Read token ids: numbers with anything but digits between.

    Raises:
        InvalidRequest: there are none, or something is not a token id.

    >>> read_ids("[1, 2;3]", "here") == pack([1, 2, 3])
    True
    """
    words = _SEPARATORS.sub(" ", text).split()
    if not words:
        raise InvalidRequest(f"no token ids in {source}")
    try:
        return pack([int(word) for word in words])
    except ValueError:
        bad = next((word for word in words if not word.isdecimal()), max(words, key=len))
        raise InvalidRequest(
            f"{bad[:40]!a} in {source} is not a token id; to take it as text, add --text"
        ) from None
    except OverflowError:
        raise InvalidRequest(f"a token id in {source} is not a number of 32 bits") from None


def looks_like_ids(text: str) -> bool:
    """Whether there is nothing in it but numbers, of any kind, and what may stand between them.

    >>> looks_like_ids("[1, 2]"), looks_like_ids("1 -2 3.0"), looks_like_ids("1 apple")
    (True, True, False)
    """
    words = _SEPARATORS.sub(" ", text).split()
    return bool(words) and all(word.isdecimal() or _NUMBER.fullmatch(word) for word in words)


def read_prompt(data: bytes, source: str, decoder: OpenDecoder, *, as_text: bool) -> bytes:
    """Read a prompt in any of its forms.

    Args:
        data: What was read.
        source: What to call it in messages.
        decoder: Opens the model's tokenizer, where the form needs one.
        as_text: Whether it is text whatever it looks like.

    Raises:
        InvalidRequest: it is no prompt, or there is no tokenizer for its form.
    """
    if as_text:
        return _from_text(_text(data, source), source, decoder)
    if source.endswith(".bin"):
        if not data or len(data) % TOKEN_BYTES:
            raise InvalidRequest(f"{source}: {len(data):,} bytes are not packed uint32 tokens")
        return data
    text = _text(data, source)
    if not text.strip():
        raise InvalidRequest(f"{source} is empty: there is no prompt in it")
    if looks_like_ids(text):
        return read_ids(text, source)
    if text.lstrip()[0] in "[{":
        try:
            value = json.loads(text, object_pairs_hook=once_each)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"{source} begins like JSON and is none ({error}); to take it as text, add --text"
            ) from None
        return _from_json(value, source, decoder)
    return _from_text(text, source, decoder)


def _text(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError:
        raise InvalidRequest(
            f"{source} is neither text nor JSON; packed token ids need a name that ends in .bin"
        ) from None


def _from_json(value: Any, source: str, decoder: OpenDecoder) -> bytes:
    try:
        requests = read_logged(value)
    except InvalidRequest as error:
        raise InvalidRequest(f"{source}: {error}") from None
    if len(requests) != 1:
        raise InvalidRequest(f"{source} holds {len(requests):,} prompts; give one of them")
    request = requests[0]
    if request.tokens is not None:
        return request.tokens
    kind = "text" if request.text is not None else "a chat"
    model = _opened(decoder, f"{source} is {kind}")
    try:
        made = model.prompt(request)
    except InvalidRequest as error:
        raise InvalidRequest(f"{source}: {error}") from None
    left_out = dict(made.left_out)
    if request.salt:
        left_out["a cache_salt, which is not looked at: give it with --salt"] = 1
    for line in tell(left_out, 1):
        say(f"{source}: {line}")
    return made.tokens


def _from_text(text: str, source: str, decoder: OpenDecoder) -> bytes:
    tokens = pack(_opened(decoder, f"{source} is text").encode(text))
    if not tokens:
        raise InvalidRequest(f"{source} is empty: there is no prompt in it")
    return tokens


def _opened(decoder: OpenDecoder, why: str) -> Decoder:
    found = decoder()
    if found is None:
        raise InvalidRequest(
            f"{why}, which needs the model's tokenizer: name its folder with --tokenizer PATH"
        )
    return found
