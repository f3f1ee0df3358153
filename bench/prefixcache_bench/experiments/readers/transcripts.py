"""Logged requests and chats: every form that `read_logged` knows, JSONL or one JSON array.

**A request** (`messages`, Responses' `input`, `prompt`, ids; below `body` or `request` too)
is one prompt, or several if `prompt` is a list of them.  If the last of `messages` is an answer,
the line is a whole chat, and each of its answers was a request.  A line may have the time of its
first request: `t`, `timestamp` or `created`, in seconds.

**ShareGPT** and its like: `conversations` or `conversation`, with `from` and `value` or `role` and
`content`.  A chat is its system messages, then what follows from its first human message to where
speakers stop taking turns; a tool's result takes the turn of who asked.

**What decides.**  Model, adapter and `cache_salt` are the namespace.  Tools stand first in a
prompt, then documents, then the messages; an image, a recording or a file is `MEDIA_TOKENS`
stand-in tokens, which its content decides.  What is in no prompt is counted, and noted.

**Order.**  Where a file has no times, chat i begins at i seconds; its turns follow after 5 to 120
seconds, drawn from a checksum, so that every run serves them in the same order.
The caller may set both paces; the trace notes how many times were made up.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

from prefixcache.errors import InvalidRequest
from prefixcache.plain_json import json_text
from prefixcache.prompts.logged_request import (
    IDLE,
    MEDIA_TOKENS,
    SPEAKERS,
    LoggedRequest,
    read_logged,
    stand_in,
)
from prefixcache.types import TOKEN_BYTES, Namespace
from prefixcache_bench.experiments.readers.lines import (
    OTHER_TIMES,
    Source,
    given,
    is_array,
    seconds,
)
from prefixcache_bench.experiments.readers.tokenizers import ChatLayout, named
from prefixcache_bench.experiments.traces import Request, Trace

MEAN_PAUSE_S = 62.5
_TIMES = ("t", "timestamp", "created")
_SYSTEM: Final = frozenset({"system", "developer"})
_ASKING: Final = frozenset({"user", "tool"})
_MEDIA: Final = f"images, recordings or files, counted as stand-ins of {MEDIA_TOKENS} tokens"
_OPTIONS: Final = "options of a chat template, which are not counted"
_THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
_OUT_OF_TURN: Final = "messages out of turn or without an answer"
_LAID_OUT: Final = frozenset({"role", "content", "tool_calls", *_THOUGHTS})
_OF_A_MESSAGE: Final = frozenset({"tool_call_id", "type", "weight", "annotations", "cache_control"})


class _Chat(NamedTuple):
    """One prompt of a record, or all turns of its chat."""

    began: float | None
    space: Namespace
    turns: list[tuple[bytes, int]]
    """(All that exists after it, tokens of the prompt) of each request."""
    not_in: set[str]
    unread: set[str]
    """Fields that are not known, of the record or its messages."""


def read(
    source: Source,
    tokenizer: str | None,
    *,
    rate: float | None = None,
    think_s: float | None = None,
) -> Trace:
    """Read logged requests and chats.

    Args:
        source: The lines.
        tokenizer: See `tokenizers.named`.
        rate: How many chats without a time begin a second; 1 if not given.
        think_s: Mean pause before a chat's next turn; 62.5 if not given.

    Raises:
        InvalidRequest: there is no such tokenizer, or no such pace.
    """
    rate, think_s = 1.0 if rate is None else rate, MEAN_PAUSE_S if think_s is None else think_s
    if not 1e-9 <= rate <= 1e9 or not 0 <= think_s <= 1e9:
        raise InvalidRequest(f"--rate {rate} and --think {think_s} are more than 0, up to 1e9")
    layout = ChatLayout(named(tokenizer))
    requests: list[tuple[float, int, int, Request]] = []
    left_out: Counter[str] = Counter()
    made_up = 0
    for number, chats in enumerate(_records(source, layout)):
        began = chats[0].began
        source.leave_unread({name for chat in chats for name in chat.unread})
        t = number / rate if began is None else began
        served = 0
        for chat in chats:
            for turn, (kept, prompt) in enumerate(chat.turns):
                if turn:
                    pause = 5 + zlib.crc32(f"{number}:{served}".encode()) % 115_001 / 1000
                    t += pause if think_s == MEAN_PAUSE_S else pause * think_s / MEAN_PAUSE_S
                made_up += bool(turn) or began is None
                source.spend(len(kept) // TOKEN_BYTES)
                request = Request(t, chat.space, kept, prompt, prompt)
                requests.append((t, number, served, request))
                served += 1
            left_out.update(dict.fromkeys(chat.not_in, len(chat.turns)))
    requests.sort(key=lambda entry: entry[:3])
    first = requests[0][0] if requests else 0.0
    found = [request._replace(t=request.t - first) for *_, request in requests]
    notes = []
    if made_up:
        notes.append(
            f"{made_up} of {len(found)} requests have no time of their own: {rate:g} "
            f"{'chat begins' if rate == 1 else 'chats begin'} a second, and a turn follows after "
            f"{think_s:g} s on average (--rate, --think)"
        )
    notes += source.unread()
    return Trace(
        source.name,
        found,
        broken=source.broken,
        num_lines=source.num_lines,
        notes=notes,
        not_counted=[
            f"{count:,} of {len(found):,} requests have {kind}"
            for kind, count in sorted(left_out.items())
        ],
    )


def _records(source: Source, layout: ChatLayout) -> Iterator[list[_Chat]]:
    """Give the prompts, or the chat, of each record."""
    seen: set[str] = set()

    def make(record: dict[str, Any] | list[Any]) -> list[_Chat]:
        try:
            prompts = read_logged(record)
        except InvalidRequest as error:
            raise ValueError(str(error)) from None
        fields = {} if isinstance(record, list) else record
        began = seconds(fields, *_TIMES)
        name = given(fields, "id") if any(one.is_logged_chat for one in prompts) else None
        if name is not None and str(name) in seen:
            raise ValueError(f"record {str(name)!r} was there before")
        prompts = [_in_turns(one) if one.is_logged_chat else one for one in prompts]
        chats = [_chat(began, source.name, one, layout) for one in prompts]
        if began is None:
            chats[0].unread.update(OTHER_TIMES & fields.keys())
        if name is not None:
            seen.add(str(name))
        return chats

    if is_array(source.head()):
        yield from source.parse_array(make, lists=True)
    else:
        yield from source.parse(make, lists=True)


def _chat(began: float | None, name: str, logged: LoggedRequest, layout: ChatLayout) -> _Chat:
    space = Namespace(logged.model or name, logged.adapter, salt=logged.salt)
    turns = list(_requests(logged, layout))
    if not all(prompt for _, prompt in turns):
        raise ValueError("the prompt is empty")
    in_messages = {name for one in logged.messages for name in one} - _LAID_OUT - _OF_A_MESSAGE
    unread = {*logged.unread, *in_messages - (IDLE - {"name"})}
    return _Chat(began, space, turns, set(_not_in(logged)), unread)


def _in_turns(chat: LoggedRequest) -> LoggedRequest:
    """Keep what takes turns: system messages, then questions with their answers.

    Raises:
        ValueError: nothing is left.
    """
    roles = [one["role"] for one in chat.messages]
    asked = roles.index("user") if "user" in roles else len(roles)
    opening = [one for one in chat.messages[:asked] if one["role"] in _SYSTEM]
    turns = []
    for index, message in enumerate(chat.messages[asked:]):
        speaks = frozenset({"assistant"}) if index % 2 else _ASKING
        if message["role"] not in speaks:
            break
        turns.append(message)
    turns = turns[: len(turns) // 2 * 2]
    if not turns:
        raise ValueError("no question with an answer")
    left_out = chat.left_out
    if len(opening) + len(turns) < len(chat.messages):
        left_out += (_OUT_OF_TURN,)
    return replace(chat, messages=(*opening, *turns), left_out=left_out)


def _requests(logged: LoggedRequest, layout: ChatLayout) -> Iterator[tuple[bytes, int]]:
    """Give (all that exists after it, tokens of the prompt) of each request."""
    if not logged.messages:
        text = logged.text
        tokens = layout.text(text) if text is not None else logged.tokens or b""
        yield tokens, len(tokens) // TOKEN_BYTES
        return
    so_far = _opening(logged, layout)
    last = logged.messages[-1]
    answered = last["role"] == "assistant" and not logged.continues
    for message in logged.messages:
        is_answer = answered and message["role"] == "assistant"
        so_far += layout.header(message["role"])
        prompt = len(so_far) // TOKEN_BYTES
        so_far += _content(message, layout)
        if is_answer:
            yield so_far, prompt
        if message is not last or not logged.continues:
            so_far += layout.end
    if not answered:
        if logged.generation_prompt and not logged.continues:
            so_far += layout.header("assistant")
        yield so_far, len(so_far) // TOKEN_BYTES


def _opening(logged: LoggedRequest, layout: ChatLayout) -> bytes:
    """Lay out what stands before all messages."""
    opening = b""
    for role, given_ in (("tools", logged.tools), ("documents", logged.documents)):
        if given_:
            text = json_text(list(given_), ensure_ascii=False)
            opening += layout.header(role) + layout.text(text) + layout.end
    return opening


def _content(message: Mapping[str, Any], layout: ChatLayout) -> bytes:
    """Lay out a message: its texts, stand-ins of its media, its calls of tools."""
    content = message["content"] or ""
    calls = message.get("tool_calls")
    called = json_text(calls, ensure_ascii=False) if calls else ""
    if isinstance(content, str):
        return layout.text(content + called)
    laid, text = b"", ""
    for part in content:
        if part["type"] == "text":
            text += part["text"]
            continue
        laid += (layout.text(text) if text else b"") + stand_in(part["digest"])
        text = ""
    return laid + layout.text(text + called)


def _not_in(logged: LoggedRequest) -> Iterator[str]:
    """Name what its prompts lack, or hold otherwise than the model would see it."""
    kinds = set(logged.left_out)
    if any(one.get(name) for one in logged.messages for name in _THOUGHTS):
        kinds.add("thoughts")
    for kind in kinds:
        yield f"{kind}, which are not counted"
    if logged.options:
        yield _OPTIONS
    last = logged.messages[-1]["role"] if logged.messages else ""
    if last != "assistant" and SPEAKERS.get(last.lower()) == "assistant":
        yield "an answer of somebody else than assistant at their end, counted as their own"
    contents = [one["content"] for one in logged.messages]
    if any(part["type"] != "text" for one in contents if isinstance(one, list) for part in one):
        yield _MEDIA
