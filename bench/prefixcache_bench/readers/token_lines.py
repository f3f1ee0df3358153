"""Our own form: one JSON object a line, `{t, namespace, tokens}`, and optionally `prompt`.

`t`: seconds.  `namespace`: the model, or [model, adapter, tenant, salt].  `tokens`: ids, or base64
of packed little-endian uint32.  `prompt`: how many of them the client sent (default: all); the
others were generated, and are stored after the request.  `prompt_token_ids`, `input_ids` and
`token_ids` are other names of `tokens`; null is as good as absent.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any, TextIO

from prefixcache.plain_json import json_text
from prefixcache.types import TOKEN_BYTES, Namespace, pack, unpack
from prefixcache_bench.readers.lines import Source, count, given, seconds
from prefixcache_bench.traces import Request, Trace

IDS = ("tokens", "prompt_token_ids", "input_ids", "token_ids")
_FIELDS = ("model", "adapter", "tenant", "salt")


def read(source: Source) -> Trace:
    """Read a trace of our own form.  Requests are served in the order of `t`."""
    spaces: dict[str, Namespace] = {}

    def make(fields: dict[str, Any]) -> Request:
        ids = given(fields, *IDS)
        if ids is None:
            raise KeyError("tokens")
        if not isinstance(ids, str | list):
            raise ValueError(f"tokens is a {type(ids).__name__}, not a list of ids or base64")
        if isinstance(ids, list) and bool in set(map(type, ids)):
            raise ValueError("a token id is a whole number, not true or false")
        tokens = base64.b64decode(ids, validate=True) if isinstance(ids, str) else pack(ids)
        total, rest = divmod(len(tokens), TOKEN_BYTES)
        prompt = total if given(fields, "prompt") is None else count(fields, "prompt")
        if rest or not 0 < prompt <= total:
            raise ValueError(f"a prompt of {prompt} of {total} tokens")
        named = given(fields, "namespace") or ""
        space = spaces.setdefault(json_text(named), _namespace(named))
        return Request(seconds(fields, "t") or 0.0, space, tokens, prompt, prompt)

    found = sorted(source.parse(make), key=lambda request: request.t)
    return Trace(source.name, found, broken=source.broken, num_lines=source.num_lines)


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


def _namespace(named: Any) -> Namespace:
    if isinstance(named, str):
        return Namespace(named)
    if isinstance(named, dict):
        return Namespace(**{name: str(given(named, name) or "") for name in _FIELDS})
    if not isinstance(named, list) or not 1 <= len(named) <= len(_FIELDS):
        raise ValueError(f"a namespace is a name or [{', '.join(_FIELDS)}], not {named!r}")
    return Namespace(*("" if part is None else str(part) for part in named))
