"""A trace as paths of block ids: for simulators that know no tokens, and may know the future."""

from __future__ import annotations

from typing import NamedTuple

from prefixcache.errors import InvalidRequest
from prefixcache.types import TOKEN_BYTES, Namespace
from prefixcache_bench.experiments.traces import Trace


class Path(NamedTuple):
    """One request: its blocks from the root, each id standing for all tokens up to its end."""

    blocks: list[int]
    """What exists once the request is done."""
    askable: int
    """Leading blocks that it may find cached: one token is always left to compute."""
    prompt_blocks: int
    """Blocks of the prompt, the last one partly filled perhaps."""


def paths(trace: Trace, block_size: int) -> list[Path]:
    """Give every request as ids, counted up from 0 in the order in which they appear.

    A block is its parent's id and its own bytes.  O(blocks).

    Raises:
        InvalidRequest: the block size does not suit the trace.
    """
    words = trace.words(block_size)
    width = words * TOKEN_BYTES
    ids: dict[tuple[int | Namespace, bytes], int] = {}
    found = []
    for request in trace.grouped(words):
        above: int | Namespace = request.namespace
        blocks = []
        for start in range(0, len(request.tokens) // width * width, width):
            key = (above, request.tokens[start : start + width])
            above = ids.setdefault(key, len(ids))
            blocks.append(above)
        prompt = -(-request.prompt // words)
        askable = request.prompt // words if trace.is_hashed else (request.prompt - 1) // words
        found.append(Path(blocks, min(askable, len(blocks)), prompt))
    if not found:
        raise InvalidRequest("an empty trace has no paths")
    return found
