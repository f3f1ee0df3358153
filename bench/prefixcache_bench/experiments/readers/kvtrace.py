"""The kvtrace-v1 form: whole conversations in one file, requests that cut them in another.

`NAME.convs.jsonl.gz` has, after a header, the tokens of each conversation; or, where the text may
not be given away, its *skeleton*: a parent, the length of the common prefix, and the length.  From
that come fresh ids whose first one is unique, which keeps every common prefix, hence every hit.
`NAME.requests.jsonl.gz` has, in the order of service, `t_ms, conv, prompt_len, cached_len`.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from prefixcache.errors import InvalidRequest
from prefixcache.types import TOKEN_BYTES, Namespace, pack
from prefixcache_bench.experiments.readers.lines import (
    MOST_LINES,
    UNREADABLE,
    Source,
    count,
    given,
    packed_ids,
    reason_of,
    seconds,
)
from prefixcache_bench.experiments.traces import Request, Trace

FORMAT = "kvtrace-v1"
CONVERSATIONS = ".convs.jsonl.gz"
REQUESTS = ".requests.jsonl.gz"
SYSTEM_PROMPTS = "system_prompts.cl100k.json"
LONGEST = 2**24
"""Tokens of a conversation of which only the length is told."""
_FIRST_FRESH = 1_000_000
_FRESH_IDS = 50_000


def names_in(folder: Path) -> list[str]:
    """List the workloads of a folder."""
    return sorted(
        path.name.removesuffix(CONVERSATIONS) for path in folder.glob(f"*{CONVERSATIONS}")
    )


def read(path: Path, name: str | None = None, system: str = "none") -> Trace:
    """Read one workload.

    Args:
        path: The folder, or one of the workload's two files.
        name: Which workload; not needed if there is only one.
        system: `none`; `one` puts the folder's first system prompt before every conversation;
            `four` one of its first four, by the conversation's number.

    Raises:
        InvalidRequest: there is no such workload; the message lists those there are.
    """
    folder = path
    if not path.is_dir():
        folder, name = path.parent, path.name.partition(".")[0]
    if name is None:
        names = names_in(folder)
        if len(names) != 1:
            raise InvalidRequest(
                f"name a workload with --name; {folder} has: {', '.join(names) or 'none'}"
            )
        name = names[0]
    convs_file, requests_file = folder / (name + CONVERSATIONS), folder / (name + REQUESTS)
    if not convs_file.exists():
        raise InvalidRequest(
            f"{folder} has no workload {name!r}; it has: {', '.join(names_in(folder)) or 'none'}"
        )
    with Source(str(convs_file)) as convs:
        tokens = conversations(convs)
    heads = _heads(folder, system, len(tokens))
    space = Namespace(name)

    def make(fields: dict[str, Any]) -> Request | None:
        if "format" in fields:
            _check_format(requests, fields)
            return None
        conv = count(fields, "conv")
        prompt, cached = count(fields, "prompt_len"), count(fields, "cached_len")
        t = seconds(fields, "t_ms", scale=1e-3)
        if t is None:
            raise KeyError("t_ms")
        whole = tokens[conv]
        if whole is None or not 0 < prompt <= cached <= len(whole) // TOKEN_BYTES:
            raise ValueError(f"conversation {conv} has no {prompt} and {cached} tokens")
        head = heads[conv]
        before = len(head) // TOKEN_BYTES
        kept = head + whole[: cached * TOKEN_BYTES]
        return Request(t, space, kept, before + prompt, before + prompt)

    with Source(str(requests_file)) as requests:
        found = [request for request in requests.parse(make) if request is not None]
    label = name if system == "none" else f"{name}+{system}"
    num_lines = convs.num_lines + requests.num_lines
    return Trace(label, found, broken=convs.broken + requests.broken, num_lines=num_lines)


def _check_format(source: Source, fields: dict[str, Any]) -> None:
    if fields["format"] != FORMAT:
        said = str(fields["format"])[:40]
        raise InvalidRequest(f"{source.name} has the format {said!a}; {FORMAT} is read")


def conversations(source: Source) -> list[bytes | None]:
    """Read the packed tokens of each conversation; None for a line that could not be read."""
    out: list[bytes | None] = []
    headers = 0

    def make(fields: dict[str, Any]) -> None:
        nonlocal headers
        if "format" in fields:
            _check_format(source, fields)
            headers += 1
            return
        # Those that could not be read have numbers, too, but for a header.
        lost = not headers and any(one.number == 1 for one in source.broken[:1])
        number = source.num_lines - 1 - headers - lost
        if given(fields, "conv") is not None:
            number = count(fields, "conv")
        if not len(out) <= number < MOST_LINES:
            raise ValueError(f"conversation {number} is out of order")
        out.extend([None] * (number - len(out)))
        tokens = _tokens(fields, out)
        source.spend(len(tokens) // TOKEN_BYTES)
        out.append(tokens)

    for _ in source.parse(make):
        pass
    return out


def _tokens(fields: dict[str, Any], before: list[bytes | None]) -> bytes:
    if given(fields, "tokens") is not None:
        return packed_ids(fields["tokens"])
    common, length = count(fields, "lcp"), count(fields, "len")
    if length > LONGEST:
        raise ValueError(f"a conversation of {length} tokens; at most {LONGEST} are read")
    number = len(before)
    kept = (before[count(fields, "parent")] or b"")[: common * TOKEN_BYTES] if common else b""
    if len(kept) != common * TOKEN_BYTES:
        raise ValueError(f"conversation {fields['parent']} has no {common} tokens")
    if length <= common:
        return kept
    fresh = np.arange(common, length, dtype=np.int64)
    fresh = (number * 7919 + fresh * 104729) % _FRESH_IDS
    fresh[0] = _FIRST_FRESH + number
    return kept + fresh.astype(np.uint32).tobytes()


def _heads(folder: Path, system: str, number: int) -> list[bytes]:
    if system == "none":
        return [b""] * number
    path = folder / SYSTEM_PROMPTS
    try:
        prompts = [pack(prompt) for prompt in json.loads(path.read_bytes())]
        first_four = prompts[0], prompts[1], prompts[2], prompts[3]
    except (OSError, *UNREADABLE) as error:
        raise InvalidRequest(f"cannot read the system prompts {path}: {reason_of(error)}") from None
    if system == "one":
        return [first_four[0]] * number
    return [first_four[zlib.crc32(f"g{conv}".encode()) % 4] for conv in range(number)]
