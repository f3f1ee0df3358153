"""From a path to a trace: the form is seen, or said."""

from __future__ import annotations

import json
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from prefixcache.errors import InvalidRequest
from prefixcache.prompts import logged_request
from prefixcache_bench.experiments.readers import hashed, kvtrace, token_lines
from prefixcache_bench.experiments.readers.lines import Source, is_array
from prefixcache_bench.experiments.traces import Trace


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
    hash_block: int | None = None,
    rate: float | None = None,
    think_s: float | None = None,
) -> Trace:
    """Read a trace.

    Args:
        path: A file, a folder of kvtrace files, or `-` for stdin.
        form: The form; seen from the first line if not given.
        name: Which workload of a folder.
        system: System prompts before a kvtrace's conversations.
        tokenizer: For chats: see `tokenizers.named`.
        hash_block: For block hashes: tokens that one stands for; by the form if not given.
        rate: For chats without times: how many begin a second; 1 if not given.
        think_s: For the same: mean pause before the next turn; 62.5 if not given.

    Raises:
        InvalidRequest: it cannot be read, or no line of it can.
    """
    if path != "-" and not _exists(path):
        raise InvalidRequest(f"there is no file or folder {path}")
    if path != "-" and (Path(path).is_dir() or form is Form.KVTRACE):
        if form not in {None, Form.KVTRACE}:
            raise InvalidRequest(f"{path} is a folder; only kvtrace files are read by the folder")
        if tokenizer is not None or hash_block is not None or (rate, think_s) != (None, None):
            raise InvalidRequest(
                "--tokenizer, --hash-block, --rate and --think are not for kvtrace files"
            )
        trace = kvtrace.read(Path(path), name, system.value)
    else:
        trace = _from_source(path, form, name, system, tokenizer, hash_block, rate, think_s)
    if not trace.requests:
        first = f"; {trace.broken[0]}" if trace.broken else ""
        raise InvalidRequest(f"no request could be read from {path}{first}")
    return trace


def _from_source(
    path: str,
    form: Form | None,
    name: str | None,
    system: System,
    tokenizer: str | None,
    hash_block: int | None,
    rate: float | None,
    think_s: float | None,
) -> Trace:
    with Source(path) as source:
        head = source.head()
        if _is_spread(head):
            raise InvalidRequest(
                f"{path} holds JSON objects of several lines each; write one a line: jq -c . FILE"
            )
        if not head.strip():
            breaks = f"; {source.broken[0]}" if source.broken else ""
            blank = f" but {len(head)} bytes of blank lines" if head else ""
            raise InvalidRequest(f"{path} is empty: there is no request in it{blank}{breaks}")
        form = form or see(head)
        if hash_block is not None and form not in {Form.MOONCAKE, Form.AGENTIC}:
            told = "of no form that is known" if form is None else f"of the form {form}"
            raise InvalidRequest(
                f"--hash-block is for traces of block hashes (mooncake, agentic); {path} is {told}"
            )
        if (rate, think_s) != (None, None) and form is not Form.CHAT:
            raise InvalidRequest(f"--rate and --think are for chats; {path} is no file of chats")
        if tokenizer is not None and form not in {Form.CHAT, None}:
            raise InvalidRequest(f"--tokenizer is for chats; {path} is of the form {form}")
        if (name is not None or system is not System.NONE) and form not in {Form.KVTRACE, None}:
            raise InvalidRequest(
                f"--name and --system are for kvtrace files; {path} is of the form {form}"
            )
        match form:
            case Form.MOONCAKE:
                return hashed.read_mooncake(source, hash_block)
            case Form.AGENTIC:
                return hashed.read_agentic(source, hash_block)
            case Form.JSONL:
                return token_lines.read(source)
            case Form.CHAT:
                from prefixcache_bench.experiments.readers import (
                    transcripts,  # here: it may load a tokenizer
                )

                return transcripts.read(source, tokenizer, rate=rate, think_s=think_s)
    if form is Form.KVTRACE and path == "-":
        raise InvalidRequest("a kvtrace is two files; name their folder instead of -")
    if form is Form.KVTRACE:
        return kvtrace.read(Path(path), name, system.value)
    raise InvalidRequest(f"cannot tell the form of {path}: {_what_is(head)}. Known are {_KNOWN}")


_KNOWN = (
    'token lines ({"tokens": [1, 2]}, [1, 2]), requests and chats ({"messages": ...}, '
    '{"prompt": ...}, {"text": ...}, {"input": ...}, [{"role": ...}], ShareGPT), '
    'block hashes ({"hash_ids": ...}; delta-hash-v1) and folders of kvtrace files; '
    "name one with --format " + "|".join(known.value for known in Form)
)


def _what_is(head: bytes) -> str:
    """Say what a file of no known form begins with."""
    line = head.lstrip().split(b"\n", 1)[0].strip()
    shown = ascii(line[:60].decode("utf-8", "replace"))[1:-1]
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        if line.count(b",") > 1 and not line.startswith((b"{", b"[")):
            return f"it looks like CSV, which names no prefix ({shown})"
        return f"its first line is no JSON object ({shown})"
    if isinstance(value, dict):
        names = ", ".join(ascii(name) for name in list(value)[:8]) or "none"
        return f"the fields of its first line are {names}"
    return f"its first line is a JSON {type(value).__name__}, not an object ({shown})"


def _is_spread(head: bytes) -> bool:
    """Whether it begins with an object that goes on in the next lines."""
    first, _, rest = head.lstrip().partition(b"\n")
    if not first.startswith(b"{") or not rest.strip():
        return False
    with suppress(ValueError, RecursionError):
        json.loads(first)
        return False
    if first.strip() == b"{":
        return True
    with suppress(ValueError, RecursionError):
        _, end = json.JSONDecoder().raw_decode(head.decode("utf-8", "replace").lstrip())
        return end > len(first)
    return False


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte in it
        raise InvalidRequest(f"cannot read {path[:60]}: {error}") from None


def see(head: bytes) -> Form | None:
    """Tell the form from a file's first bytes; None if none fits."""
    text = head.lstrip()
    if is_array(head):
        return Form.CHAT
    for line in text.split(b"\n", 3)[:3]:
        form = _see_line(line)
        if form is not None:
            return form
    # A first line longer than what was read, or broken: its field names still show.
    if text.startswith(b"["):
        return Form.JSONL if text[1:].lstrip(b"[ \t")[:1].isdigit() else Form.CHAT
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
    b'"conversation"': Form.CHAT,
    b'"body"': Form.CHAT,
    b'"prompt":': Form.CHAT,
    b'"input":': Form.CHAT,
    b'"prompt_token_ids"': Form.JSONL,
    b'"input_ids"': Form.JSONL,
    b'"token_ids"': Form.JSONL,
    b'"tokens"': Form.JSONL,
    b'"text":': Form.CHAT,
}


def _see_line(line: bytes) -> Form | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(fields, list):
        flat = fields[0] if fields and isinstance(fields[0], list) else fields
        return Form.JSONL if flat and not isinstance(flat[0], str | dict) else Form.CHAT
    if not isinstance(fields, dict):
        return None
    fields = {name: value for name, value in fields.items() if value is not None}
    named = str(fields.get("format"))  # as other forms call theirs of an answer
    if named.startswith("kvtrace"):
        return Form.KVTRACE
    if named.startswith("delta-hash"):
        return Form.AGENTIC
    if "hash_ids" in fields:
        return Form.MOONCAKE
    if fields.keys() & set(logged_request.IDS):
        return Form.JSONL
    return Form.CHAT if fields.keys() & _CHATS else None


_CHATS = logged_request.KEYS - set(logged_request.IDS)
