"""Chat transcripts: OpenAI-style JSONL, and ShareGPT JSON, also one that breaks off.

**OpenAI style**: a line has `messages` (or a `body` or `request` that has): a list of `role`,
`content`.  If the last message is an answer, the line is a whole chat, and each of its answers was
a request; if not, the line is one request, as it was logged.  A line may have the time of its first
request: `t`, `timestamp` or `created`, in seconds.

**ShareGPT**: a list of objects with `conversations`: `from`, `value`.  As usual, a chat begins with
its first human message and ends where speakers stop taking turns.

**Order.**  Where a file has no times, chat i begins at i seconds; its turns follow after 5 to 120
seconds, drawn from a checksum, so that every run serves them in the same order.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from prefixcache.plain_json import json_text
from prefixcache.types import TOKEN_BYTES, Namespace
from prefixcache_bench.readers.lines import Source
from prefixcache_bench.readers.tokenizers import ChatLayout, named
from prefixcache_bench.traces import BrokenLine, Request, Trace

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_TIMES = ("t", "timestamp", "created")


class Message(NamedTuple):
    """One message of a chat."""

    role: str
    content: str


def read(source: Source, tokenizer: str | None) -> Trace:
    """Read a transcript.

    Raises:
        InvalidRequest: there is no such tokenizer.
    """
    layout = ChatLayout(named(tokenizer))
    space = Namespace(source.name)
    requests: list[tuple[float, int, int, Request]] = []
    chats = _sharegpt(source) if source.head().lstrip().startswith(b"[") else _openai(source)
    for number, (began, messages) in enumerate(chats):
        t = float(number) if began is None else began
        for turn, (kept, prompt) in enumerate(_requests(messages, layout)):
            if turn:
                t += 5 + zlib.crc32(f"{number}:{turn}".encode()) % 115_001 / 1000
            requests.append((t, number, turn, Request(t, space, kept, prompt, prompt)))
    requests.sort(key=lambda entry: entry[:3])
    first = requests[0][0] if requests else 0.0
    found = [request._replace(t=request.t - first) for *_, request in requests]
    return Trace(source.name, found, broken=source.broken)


def _requests(messages: list[Message], layout: ChatLayout) -> Iterator[tuple[bytes, int]]:
    """Give (all that exists after it, tokens of the prompt) of each request of a chat."""
    so_far = b""
    answered = bool(messages) and messages[-1].role == "assistant"
    for role, content in messages:
        so_far += layout.header(role)
        prompt = len(so_far) // TOKEN_BYTES
        so_far += layout.text(content)
        if answered and role == "assistant":
            yield so_far, prompt
        so_far += layout.end
    if messages and not answered:
        so_far += layout.header("assistant")
        yield so_far, len(so_far) // TOKEN_BYTES


def _openai(source: Source) -> Iterator[tuple[float | None, list[Message]]]:
    def make(fields: dict[str, Any]) -> tuple[float | None, list[Message]]:
        if "conversations" in fields:
            return None, _turns(fields["conversations"])
        body = fields
        for wrapper in ("body", "request"):
            if isinstance(fields.get(wrapper), dict):
                body = fields[wrapper]
        given = body["messages"]
        if not isinstance(given, list) or not given:
            raise ValueError("messages is not a list of messages")
        times = [fields[name] for name in _TIMES if isinstance(fields.get(name), int | float)]
        return (float(times[0]) if times else None), [_message(one) for one in given]

    yield from source.parse(make)


def _message(fields: dict[str, Any]) -> Message:
    role, content = fields["role"], fields.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content)
    text = content or ""
    for extra in ("tool_calls", "function_call"):
        if fields.get(extra):
            text += json_text(fields[extra], ensure_ascii=False)
    return Message(str(role), str(text))


def _sharegpt(source: Source) -> Iterator[tuple[None, list[Message]]]:
    """Decode one record after the other, so that a file that breaks off gives all whole ones."""
    text = source.text()
    decoder = json.JSONDecoder()
    at, number, size = text.index("[") + 1, 0, len(text)
    seen: set[str] = set()
    while True:
        while at < size and text[at] in " \n\r\t,":
            at += 1
        if at < size and text[at] == "]":
            return
        number += 1
        try:
            record, at = decoder.raw_decode(text, at)
        except ValueError as error:
            reason = f"the file breaks off in it: {error}"
            source.broken.append(BrokenLine(number, reason, "record"))
            return
        try:
            name = str(record.get("id", number))
            if name in seen:
                raise ValueError(f"record {name!r} was there before")
            messages = _turns(record["conversations"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = str(error) or type(error).__name__
            source.broken.append(BrokenLine(number, reason, "record"))
            continue
        seen.add(name)
        yield None, messages


def _turns(given: list[dict[str, Any]]) -> list[Message]:
    """Keep what takes turns: from the first human message on, questions with their answers.

    Raises:
        ValueError: somebody else speaks, or nothing is left.
    """
    messages: list[Message] = []
    for one in given:
        if one["from"] == "system" and not messages:
            continue
        if one["from"] not in _SPEAKERS:
            raise ValueError(f"{one['from']!r} speaks, who is neither human nor gpt")
        messages.append(Message(_SPEAKERS[one["from"]], str(one["value"])))
    while messages and messages[0].role != "user":
        messages.pop(0)
    turns: list[Message] = []
    for index, message in enumerate(messages):
        if message.role != ("user", "assistant")[index % 2]:
            break
        turns.append(message)
    turns = turns[: len(turns) // 2 * 2]
    if not turns:
        raise ValueError("no question with an answer")
    return turns
