"""Chat transcripts: OpenAI-style JSONL, and ShareGPT JSON, also one that breaks off.

**OpenAI style**: a line has `messages` (or a `body` or `request` that has): a list of `role`,
`content`.  If the last message is an answer, the line is a whole chat, and each of its answers was
a request; if not, the line is one request, as it was logged.  A line may have the time of its first
request: `t`, `timestamp` or `created`, in seconds.

**ShareGPT**: a list of objects with `conversations`: `from`, `value`.  As usual, a chat begins with
its first human message and ends where speakers stop taking turns.

**Order.**  Where a file has no times, chat i begins at i seconds; its turns follow after 5 to 120
seconds, drawn from a checksum, so that every run serves them in the same order.
The caller may set both paces; the trace notes how many times were made up.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from prefixcache.errors import InvalidRequest
from prefixcache.plain_json import json_text
from prefixcache.types import TOKEN_BYTES, Namespace
from prefixcache_bench.readers.lines import Source, given, seconds
from prefixcache_bench.readers.tokenizers import ChatLayout, named
from prefixcache_bench.traces import Request, Trace

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
MEAN_PAUSE_S = 62.5
_TIMES = ("t", "timestamp", "created")


class Message(NamedTuple):
    """One message of a chat."""

    role: str
    content: str


def read(
    source: Source,
    tokenizer: str | None,
    *,
    rate: float | None = None,
    think_s: float | None = None,
) -> Trace:
    """Read a transcript.

    Args:
        source: The lines.
        tokenizer: See `tokenizers.named`.
        rate: How many chats without a time begin a second; 1 if not given.
        think_s: Mean pause before a chat's next turn; 62.5 if not given.

    Raises:
        InvalidRequest: there is no such tokenizer, or no such pace.
    """
    rate, think_s = rate or 1.0, MEAN_PAUSE_S if think_s is None else think_s
    if not 1e-9 <= rate <= 1e9 or not 0 <= think_s <= 1e9:
        raise InvalidRequest(f"--rate {rate} and --think {think_s} are more than 0, up to 1e9")
    layout = ChatLayout(named(tokenizer))
    space = Namespace(source.name)
    requests: list[tuple[float, int, int, Request]] = []
    chats = _chats(source)
    made_up = 0
    for number, (began, messages) in enumerate(chats):
        t = number / rate if began is None else began
        for turn, (kept, prompt) in enumerate(_requests(messages, layout)):
            if turn:
                pause = 5 + zlib.crc32(f"{number}:{turn}".encode()) % 115_001 / 1000
                t += pause if think_s == MEAN_PAUSE_S else pause * think_s / MEAN_PAUSE_S
            made_up += bool(turn) or began is None
            requests.append((t, number, turn, Request(t, space, kept, prompt, prompt)))
    requests.sort(key=lambda entry: entry[:3])
    first = requests[0][0] if requests else 0.0
    found = [request._replace(t=request.t - first) for *_, request in requests]
    notes = []
    if made_up:
        notes.append(
            f"{made_up} of {len(found)} requests have no time of their own: {rate:g} chats begin a "
            f"second, and a turn follows after {think_s:g} s on average (--rate, --think)"
        )
    return Trace(source.name, found, broken=source.broken, num_lines=source.num_lines, notes=notes)


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


def _chats(source: Source) -> Iterator[tuple[float | None, list[Message]]]:
    """Give when each chat begins, if it tells, and its messages."""
    seen: set[str] = set()

    def make(fields: dict[str, Any]) -> tuple[float | None, list[Message]]:
        turns = given(fields, "conversations", "conversation")
        if turns is not None:
            name = given(fields, "id")
            if name is not None and str(name) in seen:
                raise ValueError(f"record {str(name)!r} was there before")
            messages = _turns(turns)
            if name is not None:
                seen.add(str(name))
            return seconds(fields, *_TIMES), messages
        body = fields
        for wrapper in ("body", "request"):
            if isinstance(fields.get(wrapper), dict):
                body = fields[wrapper]
        logged = body["messages"]
        if not isinstance(logged, list) or not logged:
            raise ValueError("messages is not a list of messages")
        return seconds(fields, *_TIMES), [_message(one) for one in logged]

    if source.head().lstrip().startswith(b"["):
        yield from source.parse_array(make)
    else:
        yield from source.parse(make)


def _message(fields: dict[str, Any]) -> Message:
    role, content = fields["role"], fields.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content)
    text = content or ""
    for extra in ("tool_calls", "function_call"):
        if fields.get(extra):
            text += json_text(fields[extra], ensure_ascii=False)
    return _whole(str(role), str(text))


def _whole(role: str, content: str) -> Message:
    """Make a message; half a character, which JSON can escape, is in no text.

    Raises:
        ValueError: there is one.
    """
    (role + content).encode()
    return Message(role, content)


def _turns(turns_given: list[dict[str, Any]]) -> list[Message]:
    """Keep what takes turns: from the first human message on, questions with their answers.

    Raises:
        ValueError: somebody else speaks, or nothing is left.
    """
    messages: list[Message] = []
    for one in turns_given:
        if "from" not in one and "role" in one:
            messages.append(_message(one))
            continue
        if one["from"] == "system" and not messages:
            continue
        if one["from"] not in _SPEAKERS:
            raise ValueError(f"{one['from']!r} speaks, who is neither human nor gpt")
        messages.append(_whole(_SPEAKERS[one["from"]], str(one["value"])))
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
