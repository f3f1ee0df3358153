"""From a path to a trace: the form is seen, or said."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path

from prefixcache.errors import InvalidRequest
from prefixcache_bench.readers import hashed, kvtrace, token_lines
from prefixcache_bench.readers.lines import Source
from prefixcache_bench.traces import Trace


class Form(StrEnum):
    """The forms of traces that can be read."""

    KVTRACE = "kvtrace"
    MOONCAKE = "mooncake"
    AGENTIC = "agentic"
    JSONL = "jsonl"
    CHAT = "chat"


class System(StrEnum):
    """System prompts before a kvtrace's conversations."""

    NONE = "none"
    ONE = "one"
    FOUR = "four"


def load(
    path: str,
    *,
    form: Form | None = None,
    name: str | None = None,
    system: System = System.NONE,
    tokenizer: str | None = None,
) -> Trace:
    """Read a trace.

    Args:
        path: A file, a folder of kvtrace files, or `-` for stdin.
        form: The form; seen from the first line if not given.
        name: Which workload of a folder.
        system: System prompts before a kvtrace's conversations.
        tokenizer: For chats: see `tokenizers.named`.

    Raises:
        InvalidRequest: it cannot be read, or no line of it can.
    """
    if path != "-" and not Path(path).exists():
        raise InvalidRequest(f"there is no file or folder {path}")
    if path != "-" and (Path(path).is_dir() or form is Form.KVTRACE):
        if form not in {None, Form.KVTRACE}:
            raise InvalidRequest(f"{path} is a folder; only kvtrace files are read by the folder")
        trace = kvtrace.read(Path(path), name, system.value)
    else:
        trace = _from_source(path, form, name, system, tokenizer)
    if not trace.requests:
        first = f"; {trace.broken[0]}" if trace.broken else ""
        raise InvalidRequest(f"no request could be read from {path}{first}")
    return trace


def _from_source(
    path: str, form: Form | None, name: str | None, system: System, tokenizer: str | None
) -> Trace:
    with Source(path) as source:
        form = form or see(source.head())
        match form:
            case Form.MOONCAKE:
                return hashed.read_mooncake(source)
            case Form.AGENTIC:
                return hashed.read_agentic(source)
            case Form.JSONL:
                return token_lines.read(source)
            case Form.CHAT:
                from prefixcache_bench.readers import transcripts  # here: it may load a tokenizer

                return transcripts.read(source, tokenizer)
    if form is Form.KVTRACE and path == "-":
        raise InvalidRequest("a kvtrace is two files; name their folder instead of -")
    if form is Form.KVTRACE:
        return kvtrace.read(Path(path), name, system.value)
    raise InvalidRequest(
        f"cannot tell the form of {path} from its beginning; say --format "
        + "|".join(known.value for known in Form)
    )


def see(head: bytes) -> Form | None:
    """Tell the form from a file's first bytes; None if none fits."""
    text = head.lstrip()
    if text.startswith(b"["):
        return Form.CHAT
    for line in text.split(b"\n", 3)[:3]:
        form = _see_line(line)
        if form is not None:
            return form
    # A first line longer than what was read, or broken: its field names still show.
    for mark, form in _MARKS.items():
        if mark in head[:4096]:
            return form
    return None


_MARKS = {
    b'"kvtrace-v1"': Form.KVTRACE,
    b'"delta-hash-v1"': Form.AGENTIC,
    b'"hash_ids"': Form.MOONCAKE,
    b'"messages"': Form.CHAT,
    b'"conversations"': Form.CHAT,
    b'"tokens"': Form.JSONL,
}


def _see_line(line: bytes) -> Form | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    if not isinstance(fields, dict):
        return None
    if "format" in fields:
        return Form.KVTRACE if str(fields["format"]).startswith("kvtrace") else Form.AGENTIC
    if "hash_ids" in fields:
        return Form.MOONCAKE
    if {"messages", "conversations", "body", "request"} & fields.keys():
        return Form.CHAT
    return Form.JSONL if "tokens" in fields else None
