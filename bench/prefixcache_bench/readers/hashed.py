"""Block-hash traces: Mooncake's form, and the agentic one that tells only what changes.

**Mooncake**: `timestamp` (ms), `input_length`, `hash_ids`, one for each 512 tokens of the prompt;
the last block may be partly filled.

**Agentic** (`delta-hash-v1`): a header, then `t_ms, trace, i, input_length, keep, tail`: the ids
of request i are `ids(i-1)[:keep] + tail`.  Blocks of 64 tokens, full ones only.  Ids are local to
their session (`trace`), so each session is a namespace of its own.
"""

from __future__ import annotations

from typing import Any

from prefixcache.errors import InvalidRequest
from prefixcache.types import TOKEN_BYTES, Namespace, pack
from prefixcache_bench.readers.lines import Source
from prefixcache_bench.traces import Request, Trace

MOONCAKE_UNIT = 512
AGENTIC_UNIT = 64


def read_mooncake(source: Source, unit: int = MOONCAKE_UNIT) -> Trace:
    """Read Mooncake JSONL.  Requests stay in the order of the file."""
    space = Namespace(source.name)

    def make(fields: dict[str, Any]) -> Request:
        ids, length = fields["hash_ids"], int(fields["input_length"])
        if not ids or not (len(ids) - 1) * unit < length <= len(ids) * unit:
            raise ValueError(f"{len(ids)} blocks of {unit} do not fit {length} tokens")
        return Request(float(fields["timestamp"]) / 1000, space, pack(ids), len(ids), length)

    return Trace(source.name, list(source.parse(make)), unit, source.broken, counts_last=True)


def read_agentic(source: Source) -> Trace:
    """Read an agentic trace.

    Raises:
        InvalidRequest: its header names a block size that is not a power of two.
    """
    unit = AGENTIC_UNIT
    before: dict[int, bytes] = {}

    def make(fields: dict[str, Any]) -> Request | None:
        nonlocal unit
        if "format" in fields:
            unit = int(fields.get("block_size", unit))
            return None
        session, length, keep = int(fields["trace"]), int(fields["input_length"]), fields["keep"]
        earlier = before.get(session, b"")
        if not 0 <= keep * TOKEN_BYTES <= len(earlier):
            raise ValueError(f"keeps {keep} of {len(earlier) // TOKEN_BYTES} blocks")
        ids = earlier[: keep * TOKEN_BYTES] + pack(fields["tail"])
        before[session] = ids
        if len(ids) // TOKEN_BYTES * unit > length:
            raise ValueError(f"{len(ids) // TOKEN_BYTES} blocks of {unit} exceed {length} tokens")
        space = Namespace(source.name, salt=str(session))
        return Request(float(fields["t_ms"]) / 1000, space, ids, len(ids) // TOKEN_BYTES, length)

    found = [request for request in source.parse(make) if request is not None]
    if unit < 1 or unit & (unit - 1):
        raise InvalidRequest(f"the header's block size {unit} is not a power of two")
    return Trace(source.name, found, unit, source.broken)
