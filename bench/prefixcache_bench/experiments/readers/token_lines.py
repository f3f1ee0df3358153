"""Our own form: one JSON object a line, `{t, namespace, tokens}`, and optionally `prompt`.

`t`: seconds.  `namespace`: the model, or [model, adapter, tenant, salt].  `tokens`: ids, or base64
of packed little-endian uint32.  `prompt`: how many of them the client sent (default: all); the
others were generated, and are stored after the request.  `prompt_token_ids`, `input_ids` and
`token_ids` are other names of `tokens`, which may be a list of prompts; null is as good as absent.
Without `namespace`, `model`, an adapter and `cache_salt` are it, as servers log them; a text that
stands as `prompt` beside the ids is what they are of.
A line that is a list is its `tokens`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any, TextIO

from prefixcache.errors import InvalidRequest
from prefixcache.plain_json import json_text
from prefixcache.prompts.logged_request import (
    DECIDES,
    IDLE,
    IDS,
    LoggedRequest,
    read_logged,
    refuse_other_ids,
)
from prefixcache.types import TOKEN_BYTES, Namespace, unpack
from prefixcache_bench.experiments.readers.lines import (
    OTHER_TIMES,
    Source,
    count,
    given,
    seconds,
)
from prefixcache_bench.experiments.traces import Request, Trace

_FIELDS = ("model", "adapter", "tenant", "salt")
_READ = {"namespace", "prompt", *IDS, *DECIDES, *IDLE}


def read(source: Source) -> Trace:
    """Read a trace of our own form.  Requests are served in the order of `t`."""
    spaces: dict[Namespace, Namespace] = {}
    timeless = 0

    def make(line: dict[str, Any] | list[Any]) -> list[Request]:
        nonlocal timeless
        fields = {"tokens": line} if isinstance(line, list) else line
        ids = given(fields, *IDS)
        if ids is None:
            raise KeyError("tokens")
        if not isinstance(ids, str | list):
            raise ValueError(f"tokens is a {type(ids).__name__}, not a list of ids or base64")
        beside = {name: fields[name] for name in DECIDES if name in fields}
        try:
            refuse_other_ids(fields)
            logged = read_logged({**beside, "tokens": [0] if isinstance(ids, str) else ids})
        except InvalidRequest as error:
            raise ValueError(str(error)) from None
        prompts = [one.tokens or b"" for one in logged]
        if isinstance(ids, str):
            prompts = [_unpacked(ids)]
        named = given(fields, "namespace")
        space = _namespace(named) if named is not None else _space(logged[0])
        space = spaces.setdefault(space, space)
        t = seconds(fields, "t", "timestamp", "created")
        sent = given(fields, "prompt")
        whole = len(prompts) > 1 or sent is None or isinstance(sent, str)
        unread = fields.keys() - _READ
        source.leave_unread(unread if t is not None else {*unread, *fields.keys() & OTHER_TIMES})
        found = [
            _request(t or 0.0, space, tokens, None if whole else count(fields, "prompt"))
            for tokens in prompts
        ]
        timeless += len(found) if t is None else 0
        return found

    parts = list(source.parse(make, lists=True))
    found = sorted((one for part in parts for one in part), key=lambda request: request.t)
    notes = source.unread()
    if 0 < timeless < len(found):
        notes.append(
            f"{timeless:,} of {len(found):,} requests have no time: they are served at 0 s, "
            "whatever is before them in the file"
        )
    return Trace(
        source.name,
        found,
        broken=source.broken,
        num_lines=source.num_lines,
        notes=notes,
    )


def write(requests: Iterable[Request], file: TextIO, *, packed: bool = False) -> int:
    """Write requests in our own form.

    Args:
        requests: Of a token trace.
        file: Where to.
        packed: Tokens as base64: a third of the size, ten times as fast to read.

    Returns:
        How many.
    """
    written = 0
    for request in requests:
        space = request.namespace
        named: Any = space.model
        if space.adapter or space.tenant or space.salt:
            named = [space.model, space.adapter, space.tenant, space.salt]
        tokens: Any = (
            base64.b64encode(request.tokens).decode() if packed else unpack(request.tokens).tolist()
        )
        fields = {"t": round(request.t, 6), "namespace": named, "prompt": request.prompt}
        file.write(json_text(fields | {"tokens": tokens}, separators=(",", ":")) + "\n")
        written += 1
    return written


def _request(t: float, space: Namespace, tokens: bytes, prompt: int | None) -> Request:
    total, rest = divmod(len(tokens), TOKEN_BYTES)
    prompt = total if prompt is None else prompt
    if rest or not 0 < prompt <= total:
        raise ValueError(f"a prompt of {prompt} of {total} tokens")
    return Request(t, space, tokens, prompt, prompt)


def _unpacked(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"tokens is a text, and no base64 of packed ids: {error}") from None


def _space(logged: LoggedRequest) -> Namespace:
    return Namespace(logged.model, logged.adapter, salt=logged.salt)


def _namespace(named: Any) -> Namespace:
    if isinstance(named, str):
        return Namespace(named)
    if isinstance(named, dict) and named.keys() <= set(_FIELDS):
        return _of_texts([str(given(named, name) or "") for name in _FIELDS])
    if not isinstance(named, list) or not 1 <= len(named) <= len(_FIELDS):
        raise ValueError(f"a namespace is a name or [{', '.join(_FIELDS)}], not {named!r}")
    return _of_texts(["" if part is None else str(part) for part in named])


def _of_texts(texts: list[str]) -> Namespace:
    model, adapter, tenant, salt = [*texts, "", "", ""][: len(_FIELDS)]
    return Namespace(model, adapter, tenant, salt)
