"""A request as servers log it, in whatever form it came: one reading of it for every command.

```
OpenAI chat     messages with text, parts, null or no content, tool_calls; tools, functions,
                documents, chat_template_kwargs, add_generation_prompt, continue_final_message
Responses       input (a text, or items), instructions, tools
Anthropic       system beside messages; blocks text, image, tool_use, tool_result
completions     prompt, text or inputs: a text, token ids, or a list of either
token ids       tokens, prompt_token_ids, input_ids, token_ids
data sets       conversations, conversation: from and value, or role and content
beside a text   system; image, images, image_data … of a data set or SGLang; extra_body of a client
a batch's line  any of these below body or request; of a tracer, below input or inputs
as text         messages, tools and options as JSON text
a list          messages, token ids, texts
```
A key that is null is as good as absent.  `model`, the adapter and `cache_salt` say what may be
shared at all.  An image, a recording or a file becomes a stand-in that its content alone decides.
What decides a prompt and is not in it is named (`left_out`), and so is any field that is not known
(`unread`); where it is left open what the prompt is, the record is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b, shake_256
from typing import Any, Final

from prefixcache.errors import InvalidRequest
from prefixcache.plain_json import json_text, once_each
from prefixcache.types import pack

IDS: Final = ("tokens", "prompt_token_ids", "input_ids", "token_ids")
CHATS: Final = ("messages", "conversations", "conversation")
_TEXT_NAMES: Final = ("prompt", "input", "inputs", "text")
_WRAPPERS: Final = ("body", "request", "params")
KEYS: Final = frozenset({*IDS, *CHATS, *_TEXT_NAMES, *_WRAPPERS})
"""An object with none of these is no request."""
_MODEL: Final = ("model", "model_name", "model_id", "modelId")
_ADAPTER: Final = (
    *("adapter", "adapter_name", "adapter_id"),
    *("lora_name", "lora_id", "lora", "lora_request", "lora_path"),
)
_ADAPTER_INSIDE: Final = (
    *("lora_name", "name", "adapter_name", "lora_path", "path", "lora_id", "id", "lora_int_id"),
)
_SALT: Final = ("cache_salt", "extra_key")
PLACE: Final = (*_MODEL, *_ADAPTER, *_SALT)
"""What says within what a request may share."""

MEDIA_TOKENS: Final = 256
"""Stand-in tokens of an image, a recording or a file; how many a model takes, it alone knows."""
_MEDIA_IDS: Final = 1 << 30
"""Ids from here on are in no vocabulary."""

SPEAKERS: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
    "function": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "developer": "developer",
}
_TEXTS: Final = {"text", "input_text", "output_text", "refusal"}
_ABOUT_PARTS: Final = {"type", "id", "cache_control", "annotations", "citations", "logprobs"}
"""What may stand in a part that has no text: it says nothing else, as one with null for it."""
_MEDIA: Final = {
    "image_url": "image",
    "image": "image",
    "input_image": "image",
    "image_pil": "image",
    "image_embeds": "image",
    "input_audio": "recording",
    "audio_url": "recording",
    "audio": "recording",
    "video_url": "video",
    "video": "video",
    "file": "file",
    "input_file": "file",
    "document": "file",
}
_THOUGHTS: Final = {"thinking", "redacted_thinking", "reasoning"}
_SOURCES: Final = ("url", "data", "file_data", "file_id", "image_url", "file_url", "text", "source")
_SETTINGS: Final = (
    *("detail", "fps", "num_frames", "min_pixels", "max_pixels", "resized_height"),
    *("resized_width", "title", "context"),
)
"""What stands beside a medium and makes other tokens of it."""
_NO_CONTENT: Final = frozenset(
    {*_SETTINGS, "type", "media_type", "mime_type", "format", "cache_control", "filename", "uuid"}
)
_BESIDE: Final = {
    "image": "image",
    "images": "image",
    "video": "video",
    "videos": "video",
    "audio": "recording",
    "audios": "recording",
    "image_data": "image",
    "video_data": "video",
    "audio_data": "recording",
}
"""Media that stand beside a text, not in it, and their kinds."""
_UNPLACED: Final = (
    *("multi_modal_data", "multimodal_data", "mm_data", "multi_modal_uuids"),
    *("prompt_embeds", "input_embeds", "inputs_embeds"),
)
"""Of an engine's own form: the ids, or the text, are the same for other pictures."""
_MEDIA_BEFORE: Final[Any] = object()
_HELD: Final[Any] = object()
"""Keys of what was read already: media before a message, a part's digest.  No JSON has them."""
_NOT_READ: Final = {
    "suffix": "suffixes",
    "truncate_prompt_tokens": "prompts that were cut",
    "mm_processor_kwargs": "settings for images",
    "previous_response_id": "earlier responses that are named by id",
    "conversation": "conversations that are named by id",
    "toolConfig": "tools in a form that is not read",
    "chat_template": "chat templates of their own",
    "template": "templates of their own",
    "context": "earlier turns as token ids",
    "history": "earlier turns beside a prompt",
    "input_prefix": "texts before a gap",
    "input_suffix": "texts behind a gap",
    "input_extra": "texts of other files",
}
"""What decides a prompt and is not read, and what to call it."""
_NAMED: Final = (str, int, dict, list)
_TOOLS: Final = ("tools", "functions", "documents")
_SYSTEM: Final = ("system", "system_prompt", "system_instruction", "instructions")
_OF_A_CHAT: Final = (
    *("chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
    *("reasoning_effort", "reasoning"),
)
_AS_TEXT: Final = (*CHATS, "chat_template_kwargs")
"""What data sets hold as JSON text; `tools` and `documents`, too."""
_SAID: Final = ("content", "value", "text", "parts", "message")
"""Where the words of a message may be."""
_ELSEWHERE: Final = ("tool_calls", "function_call", "refusal", "reasoning_content", "reasoning")
"""What a message may have in the place of words."""
DECIDES: Final = frozenset({*PLACE, *_BESIDE, *_UNPLACED, "extra_body"})
"""What may stand beside token ids and says what they mean."""
_DEEPEST: Final = 4
_SAMPLING: Final = """
temperature top_p top_k min_p typical_p n best_of seed echo stream stream_options use_beam_search
early_stopping max_tokens max_new_tokens max_completion_tokens max_output_tokens min_tokens stop
stop_sequences stop_token_ids stop_ids ignore_eos presence_penalty frequency_penalty
repetition_penalty length_penalty logit_bias logprobs top_logprobs prompt_logprobs log_logits
sampling_params response_format guided_json guided_regex guided_choice guided_grammar format
structured_outputs text_format tool_choice parallel_tool_calls modalities audio verbosity
skip_special_tokens spaces_between_special_tokens include_stop_str_in_output return_token_ids
kv_transfer_params service_tier store background include truncation prediction priority timeout
wait_s keep_alive safety_identifier prompt_cache_key prompt_cache_retention
"""
_OF_THE_LOG: Final = """
id request_id custom_id conversation_id conversation_hash session_id trace_id question_id user
user_id uid uuid index idx key name title method url t ts time date timestamp created created_at
start_time end_time duration latency metadata tags source dataset language lang turn turns country
state header hashed_ip response responses output outputs completion completions answer answers
choices usage object status error finish_reason system_fingerprint chosen rejected score rating
label category type redacted toxic openai_moderation detoxify_moderation input_length output_length
"""
IDLE: Final = frozenset((_SAMPLING + _OF_THE_LOG).split())
"""What may stand beside a prompt and decides nothing of it."""
_READ: Final = frozenset(
    {*KEYS, *DECIDES, *_NOT_READ, *_TOOLS, *_SYSTEM, *_OF_A_CHAT, "instruction"}
)
_MOST_NAMES: Final = 8
_EMPTY: Final[tuple[Any, ...]] = (None, "", [], {})


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One prompt, and what was asked with it.  One of `messages`, `text` and `tokens` is there."""

    messages: tuple[dict[str, Any], ...] = ()
    """Of a chat: `role`; `content`: a text, a list of parts, or None beside `tool_calls`.  A part
    is `{"type": "text", "text": …}` or `{"type": kind, "digest": …}`."""
    text: str | None = None
    tokens: bytes | None = None
    """Packed."""
    tools: tuple[dict[str, Any], ...] = ()
    documents: tuple[dict[str, Any], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    """`chat_template_kwargs`."""
    generation_prompt: bool = True
    """Whether the prompt ends with what begins an answer."""
    continues: bool = False
    """Whether the answer goes on where the last message ends."""
    is_logged_chat: bool = False
    """A conversation of a data set, of which each answer was a request."""
    model: str = ""
    adapter: str = ""
    salt: str = ""
    left_out: tuple[str, ...] = ()
    """What is not in the prompt, as plural nouns: `("thoughts",)`."""
    unread: tuple[str, ...] = ()
    """Fields beside the prompt that are not known, up to 8: one of them may decide it."""


def read_logged(value: Any) -> list[LoggedRequest]:
    """Read all prompts of a record: one, but for a completion of several.

    Args:
        value: Parsed JSON.

    Raises:
        InvalidRequest: it is no request; the message names the field, what it is and what it takes.

    >>> read_logged({"messages": [{"role": "user", "content": "Hi"}]})[0].messages
    ({'role': 'user', 'content': 'Hi'},)
    """
    try:
        return _read(value, _DEEPEST)
    except RecursionError:
        raise InvalidRequest("the request is nested too deeply") from None


def plain_name(name: str) -> str:
    """Give the name of somebody's field as it can be shown."""
    return ascii(name[:40])[1:-1]


def stand_in(digest: str) -> bytes:
    """Give the packed tokens that stand for a medium: equal for equal content, in no vocabulary."""
    size = 4 * MEDIA_TOKENS
    drawn = int.from_bytes(shake_256(digest.encode()).digest(size), "little")
    low = int.from_bytes((_MEDIA_IDS - 1).to_bytes(4, "little") * MEDIA_TOKENS, "little")
    high = int.from_bytes(_MEDIA_IDS.to_bytes(4, "little") * MEDIA_TOKENS, "little")
    return (drawn & low | high).to_bytes(size, "little")


def _read(value: Any, deepest: int) -> list[LoggedRequest]:
    if isinstance(value, list):
        return _list(value, "the request")
    if not isinstance(value, dict):
        raise InvalidRequest(f"a request is a JSON object or list, not {_show(value)}")
    fields = {key: one for key, one in value.items() if one is not None}
    more = _parsed(fields.pop("extra_body", None), "extra_body")  # as a client was given it
    if isinstance(more, dict):
        fields |= {key: one for key, one in more.items() if one is not None}
    for wrapper in (*_WRAPPERS, "input", "inputs"):
        inner = fields.get(wrapper)
        if wrapper in _WRAPPERS:
            inner = _parsed(inner, wrapper)
        if isinstance(inner, dict) and deepest and _wraps(wrapper, inner, fields):
            outer = {key: fields[key] for key in PLACE if key in fields}
            given = {key: one for key, one in inner.items() if one is not None}
            return _read(outer | given, deepest - 1)
    for name in _AS_TEXT:
        if name in fields and name != "conversation":
            fields[name] = _parsed(fields[name], name)
    model, adapter, salt = place_of(fields)
    unknown = sorted((fields.keys() - _READ - IDLE) | _others(fields))
    more = {
        "model": model,
        "adapter": adapter,
        "salt": salt,
        "unread": tuple(unknown[:_MOST_NAMES]),
    }
    return [replace(one, **more) for one in _unplaced(fields)]


def refuse_other_ids(fields: dict[str, Any]) -> None:
    """Refuse a record that holds ids under several names, if they differ.

    Raises:
        InvalidRequest: it does.
    """
    ids = [name for name in IDS if fields.get(name) is not None]
    if any(fields[name] != fields[ids[0]] for name in ids):
        raise InvalidRequest(f"{' and '.join(ids)} differ: it is left open which is the prompt")


def _others(fields: dict[str, Any]) -> set[str]:
    """Name what a record says twice, by several names: prompts, but for the text of ids."""
    texts = [name for name in _TEXT_NAMES if not isinstance(fields.get(name), dict)]
    found = [name for name in (*CHATS, *texts) if fields.get(name)]
    if not fields.keys().isdisjoint(IDS):
        return set(found) - {"prompt", "text"}
    if "conversation" in found and _is_named(fields):
        found.remove("conversation")
    is_responses = isinstance(fields.get("input"), str) or _is_items(fields.get("input"))
    if is_responses and found[:1] == ["prompt"]:
        found = ["input", *(one for one in found if one != "input")]
    others: set[str] = set()
    systems: tuple[str, ...] = _SYSTEM
    if found[:1] == ["input"] and is_responses:  # of which both are read
        others.update(set(_SYSTEM[1:-1]) & fields.keys())
        systems = ()
    for names in (found, systems, _MODEL, _SALT):
        there = [name for name in names if fields.get(name) not in _EMPTY]
        others.update(name for name in there[1:] if fields[name] != fields[there[0]])
    return others


def _wraps(wrapper: str, inner: dict[str, Any], fields: dict[str, Any]) -> bool:
    """Whether the request is inside, as an object that is called `input` may be one itself."""
    if (fields.keys() - {wrapper, *_WRAPPERS}) & KEYS:
        return wrapper in _WRAPPERS and not inner.keys().isdisjoint(KEYS)
    return wrapper in _WRAPPERS or not inner.keys().isdisjoint(KEYS)


def _parsed(value: Any, name: str) -> Any:
    """Give what a text of JSON says; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value, object_pairs_hook=once_each)
    except ValueError as error:
        raise InvalidRequest(f"{name} is no JSON: {error}") from None


def _unplaced(fields: dict[str, Any]) -> list[LoggedRequest]:
    for name in _UNPLACED:
        if fields.get(name):
            raise InvalidRequest(
                f"{name} decides what the prompt is, and where it stands in it is not said: give "
                "messages with parts"
            )
    refuse_other_ids(fields)
    for name in IDS:
        if name in fields:
            _refuse_media(fields, name)
            return _ids(fields[name], name)
    for name in CHATS:
        if name in fields and not (name == "conversation" and _is_named(fields)):
            return [_chat(fields, name)]
    if "instruction" in fields:
        raise InvalidRequest(
            "an instruction with its input is no prompt before a template has made it one: give "
            "messages or prompt"
        )
    if isinstance(fields.get("input"), str) or _is_items(fields.get("input")):
        return [_responses(fields)]
    for name in _TEXT_NAMES:
        if name in fields:
            return _completion(fields, name)
    names = ", ".join(map(plain_name, list(fields)[:_MOST_NAMES])) or "nothing"
    raise InvalidRequest(
        f"it has {names}, but neither token ids nor a chat: give messages, prompt, input, "
        "conversations or tokens"
    )


def _is_named(fields: dict[str, Any]) -> bool:
    """Whether a conversation is one that the server has, and the input goes on with it."""
    return "input" in fields and not isinstance(fields["conversation"], list)


def _completion(fields: dict[str, Any], name: str) -> list[LoggedRequest]:
    """Read `prompt` and its like: a text, ids, messages, or a list of them, with what is beside."""
    value = fields[name]
    if _is_items(value):
        return [_chat(fields, name)]
    if isinstance(value, str) and (_system(fields) or _beside(fields)):
        return [_chat(fields | {name: [{"role": "user", "content": value}]}, name)]
    _refuse_media(fields, name)
    left_out = _not_read(fields, name)
    if _system(fields):
        left_out += ("system prompts beside token ids",)
    if any(fields.get(one) for one in _TOOLS):
        left_out += ("tools or documents beside a text",)
    return [replace(one, left_out=left_out) for one in _prompts(value, name)]


def _refuse_media(fields: dict[str, Any], name: str) -> None:
    if _beside(fields):
        raise InvalidRequest(
            f"{name} has images or recordings beside it, and does not say where they stand: give "
            "messages with parts"
        )


def _beside(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Give the media that stand beside a text, as parts."""
    parts = []
    for name, medium in _BESIDE.items():
        value = fields.get(name)
        if isinstance(value, dict) and "voice" in value:
            continue  # how the answer is to be spoken
        media = value if isinstance(value, list) else [value]
        parts += [
            {"type": medium, "digest": _digest(medium, {name: one}, name)}
            for one in media
            if one not in _EMPTY
        ]
    return parts


def _system(fields: dict[str, Any]) -> Any:
    """Give the system prompt that stands beside a prompt, or None."""
    return next((fields[name] for name in _SYSTEM if fields.get(name) not in _EMPTY), None)


def _not_read(fields: dict[str, Any], *read: str) -> tuple[str, ...]:
    found = {
        kind
        for name, kind in _NOT_READ.items()
        if name not in read and isinstance(fields.get(name), _NAMED) and fields[name]
    }
    if isinstance(fields.get("conversation"), list):
        found.discard(_NOT_READ["conversation"])
    if isinstance(fields.get("prompt"), dict):
        found.add("stored prompts that are named by id")
    return tuple(sorted(found))


def _list(value: list[Any], name: str) -> list[LoggedRequest]:
    if value and all(isinstance(one, dict) for one in value):
        if all("role" in one or "from" in one for one in value):
            left_out: list[str] = []
            messages = tuple(_messages(value, left_out))
            return [LoggedRequest(messages=messages, left_out=tuple(left_out))]
        raise InvalidRequest(f"{name} is a list of objects that are no messages; give one of them")
    return _prompts(value, name)


def _prompts(value: Any, name: str) -> list[LoggedRequest]:
    """Read a completion's prompt: a text, ids, or a list of either."""
    if isinstance(value, str):
        return [LoggedRequest(text=_whole(value, name))]
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return [LoggedRequest(text=_whole(one, name)) for one in value]
        if all(isinstance(one, list) for one in value):
            return [LoggedRequest(tokens=_packed(one, name)) for one in value]
        if not isinstance(value[0], dict):
            return [LoggedRequest(tokens=_packed(value, name))]
        return _list(value, name)
    raise InvalidRequest(f"{name} is {_show(value)}; it takes a text, token ids, or a list of them")


def _ids(value: Any, name: str) -> list[LoggedRequest]:
    if isinstance(value, list) and value and all(isinstance(one, list) for one in value):
        return [LoggedRequest(tokens=_packed(one, name)) for one in value]
    return [LoggedRequest(tokens=_packed(value, name))]


def _packed(value: Any, name: str) -> bytes:
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{name} is {_show(value)}; it takes a list of token ids")
    if set(map(type, value)) != {int}:
        bad = next(one for one in value if type(one) is not int)
        raise InvalidRequest(f"{name} holds {_show(bad)}; a token id is a whole number")
    if min(value) < 0 or max(value) > 2**32 - 1:
        bad = min(value) if min(value) < 0 else max(value)
        raise InvalidRequest(f"{name} holds {_show(bad)}; a token id is from 0 to 4294967295")
    return pack(value)


def place_of(fields: dict[str, Any]) -> tuple[str, str, str]:
    """Say within what a request may share: model, adapter, salt; empty where it does not say.

    Raises:
        InvalidRequest: one of them is no name.

    >>> place_of({"model": "m", "lora_request": {"lora_int_id": 7}})
    ('m', '7', '')
    """
    found = {"model": _first(fields, _MODEL), "salt": _first(fields, _SALT)}
    adapter = _first(fields, _ADAPTER)
    if isinstance(adapter, dict):
        adapter = _first(adapter, _ADAPTER_INSIDE)
        if adapter is None:
            raise InvalidRequest("an adapter is an object that does not name it")
    if isinstance(adapter, int) and not isinstance(adapter, bool):
        adapter = str(adapter)
    found = {"model": found["model"], "adapter": adapter, "salt": found["salt"]}
    for name, one in found.items():
        if one is not None and not isinstance(one, str):
            raise InvalidRequest(f"{name} is {_show(one)}; it takes a text")
    model, adapter, salt = (_whole(one or "", name) for name, one in found.items())
    return model, adapter, salt


def _first(fields: dict[str, Any], names: Iterable[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) not in _EMPTY), None)


def _chat(fields: dict[str, Any], name: str) -> LoggedRequest:
    left_out = list(_not_read(fields, name))
    given = fields[name]
    if name in CHATS[1:] and isinstance(given, list):
        given = [_as_spoken(one) for one in given]
    if parts := _beside(fields):
        given = _with_parts(given, parts)
    messages = list(_messages(given, left_out))
    system = _system(fields)
    if system is not None:
        messages.insert(0, {"role": "system", "content": _content(system, "system", left_out)})
    continues = _flag(fields, "continue_final_message", default=False)
    asked = fields.get("add_generation_prompt")
    generation = _flag(fields, "add_generation_prompt", default=not continues)
    if continues and generation and asked:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other: an answer goes "
            "on or begins"
        )
    options = fields.get("chat_template_kwargs", {})
    if not isinstance(options, dict):
        raise InvalidRequest(f"chat_template_kwargs is {_show(options)}; it takes an object")
    if isinstance(effort := fields.get("reasoning_effort"), str):
        options = {"reasoning_effort": effort} | options
    return LoggedRequest(
        messages=tuple(messages),
        tools=tuple(_tools(fields)),
        documents=tuple(_objects(fields, "documents")),
        options=options,
        generation_prompt=generation,
        continues=continues,
        is_logged_chat=name in CHATS[1:],
        left_out=tuple(left_out),
    )


def _as_spoken(message: Any) -> Any:
    """Give a data set's message its role, where it has the name of a speaker."""
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role.lower() not in SPEAKERS:
        return message
    return message | {"role": SPEAKERS[role.lower()]}


def _responses(fields: dict[str, Any]) -> LoggedRequest:
    left_out = list(_not_read(fields))
    given = fields["input"]
    messages: list[dict[str, Any]] = []
    for name in ("instructions", "system"):
        if fields.get(name):
            content = _content(fields[name], name, left_out)
            messages.append({"role": "system", "content": content})
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages += _messages([_item(one) for one in items], left_out)
    reasoning = fields.get("reasoning")
    effort = reasoning.get("effort") if isinstance(reasoning, dict) else None
    options = {"reasoning_effort": effort} if isinstance(effort, str) else {}
    return LoggedRequest(
        messages=tuple(messages),
        tools=tuple(_tools(fields)),
        options=options,
        left_out=tuple(left_out),
    )


def _is_items(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _item(item: dict[str, Any]) -> dict[str, Any]:
    """Turn an item of the Responses form into a message."""
    kind = item.get("type")
    if kind is not None and not isinstance(kind, str):
        raise InvalidRequest(f"the type of an item of input is {_show(kind)}; it takes a text")
    if kind in {"function_call", "custom_tool_call"}:
        call = {"name": item.get("name"), "arguments": item.get("arguments", item.get("input"))}
        calls = [{"id": item.get("call_id"), "type": "function", "function": call}]
        return {"role": "assistant", "tool_calls": calls}
    if kind in {"function_call_output", "custom_tool_call_output"}:
        name = item.get("call_id")
        return {"role": "tool", "tool_call_id": name, "content": item.get("output")}
    if kind == "reasoning":
        return {"role": "assistant", "content": [{"type": "reasoning"}]}
    if "role" not in item:
        raise InvalidRequest(f"an item of input is of type {_show(kind)}, which is not known")
    return item


def _tools(fields: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Give the tools as templates expect them, from any of their forms."""
    for one in (*_objects(fields, "tools"), *_objects(fields, "functions")):
        if isinstance(one.get("function"), dict) or "name" not in one:
            yield one
            continue
        inner = {key: value for key, value in one.items() if key != "type"}
        if "input_schema" in inner:
            inner["parameters"] = inner.pop("input_schema")
        yield {"type": "function", "function": inner}


def _objects(fields: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = fields.get(name, [])
    if isinstance(value, str):  # data sets hold them as JSON text, empty if there are none
        with suppress(ValueError):
            value = json.loads(value, object_pairs_hook=once_each) if value.strip() else []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise InvalidRequest(f"{name} is {_show(value)}; it takes a list of objects")
    return value


def _messages(given: Any, left_out: list[str] | None = None) -> Iterable[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise InvalidRequest(f"messages is {_show(given)}; it takes a list of messages")
    for number, one in enumerate(given, 1):
        where = f"message {number}"
        if not isinstance(one, dict):
            raise InvalidRequest(f"{where} is {_show(one)}; it takes an object")
        yield from _message(one, where, [] if left_out is None else left_out)


def _with_parts(messages: Any, parts: list[dict[str, Any]]) -> Any:
    """Put media that stand beside a chat where it says so, else before its user's first words."""
    if not isinstance(messages, list):
        return messages
    left = list(parts)
    held = [
        one | {"content": _filled(one["content"], left)}
        if isinstance(one, dict) and isinstance(one.get("content"), list)
        else one
        for one in messages
    ]
    if not left:
        return held
    if len(left) < len(parts):
        raise InvalidRequest(
            f"{len(parts)} images or recordings stand beside messages that have places for "
            f"{len(parts) - len(left)}"
        )
    for index, one in enumerate(messages):
        if isinstance(one, dict) and (one.get("role") or one.get("from")) in ("user", "human"):
            return [*messages[:index], one | {_MEDIA_BEFORE: parts}, *messages[index + 1 :]]
    raise InvalidRequest("there are images or recordings beside messages of which none is a user's")


def _filled(content: list[Any], media: list[dict[str, Any]]) -> list[Any]:
    """Put the next of these media into each part that has none of its own, and take it out."""
    held = list(content)
    for at, part in enumerate(held):
        medium = _MEDIA.get(part["type"]) if _is_hollow(part) else None
        found = next((one for one in media if one["type"] == medium), None)
        if found is not None:
            media.remove(found)
            held[at] = {"type": medium, _HELD: found["digest"]}
    return held


def _is_hollow(part: Any) -> bool:
    """Whether a part says that there is a medium, and not which."""
    return (
        isinstance(part, dict)
        and isinstance(part.get("type"), str)
        and part["type"] in _MEDIA
        and _source(part, part["type"]) in _EMPTY
    )


def _message(fields: dict[str, Any], where: str, left_out: list[str]) -> Iterable[dict[str, Any]]:
    """Give a message as templates take it; several if it holds results of tools."""
    made = {key: one for key, one in fields.items() if one is not None}
    if "role" not in made and "from" in made:
        speaker = made.pop("from")
        if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
            raise InvalidRequest(f"{_show(speaker)} speaks, who is neither human nor gpt")
        made["role"] = SPEAKERS[speaker.lower()]
    role = made.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where}: role is {_show(role)}; it takes a text such as user")
    _whole(role, f"{where}: role")
    parts = _said(made, where)
    results: list[dict[str, Any]] = []
    if isinstance(parts, list):
        calls = [one for one in parts if isinstance(one, dict) and one.get("type") == "tool_use"]
        if calls:
            made["tool_calls"] = [
                {
                    "id": one.get("id"),
                    "type": "function",
                    "function": {"name": one.get("name"), "arguments": one.get("input") or {}},
                }
                for one in calls
            ]
        results = [
            one for one in parts if isinstance(one, dict) and one.get("type") == "tool_result"
        ]
        taken = [id(one) for one in (*calls, *results)]
        parts = [one for one in parts if id(one) not in taken]
        if taken and not parts:
            parts = None
    if isinstance(made.get("function_call"), dict):
        made["tool_calls"] = [{"type": "function", "function": made.pop("function_call")}]
    calls_given = made.pop("tool_calls", None)
    if calls_given is not None and not isinstance(calls_given, list):
        raise InvalidRequest(f"{where}: tool_calls is {_show(calls_given)}; it takes a list")
    if calls_given:
        made["tool_calls"] = [_call(one, where) for one in calls_given]
    if parts is None and isinstance(made.get("refusal"), str):
        parts = made["refusal"]
    media = [*made.pop(_MEDIA_BEFORE, ()), *_beside(made)]
    if media and isinstance(parts, list):
        parts = _filled(parts, media)
    content = _content(parts, f"{where}: content", left_out)
    if media:
        made = {key: one for key, one in made.items() if key not in _BESIDE}
        said = [{"type": "text", "text": content}] if isinstance(content, str) else content
        content = [*media, *(said or [])]
    if content is None and not made.get("tool_calls"):
        content = ""
    for one in results:
        told = _content(one.get("content"), f"{where}: content", left_out)
        name = one.get("tool_use_id")
        yield {"role": "tool", "content": told or "", "tool_call_id": name}
    if not results or content or made.get("tool_calls"):
        yield {"role": role, "content": content} | {k: v for k, v in made.items() if k != "role"}


def _said(made: dict[str, Any], where: str) -> Any:
    """Take the words of a message out of it, wherever they are."""
    found = next((name for name in _SAID if made.get(name) not in _EMPTY), None)
    if found is not None:
        said = made[found]
        for name in ("content", found):
            made.pop(name, None)
        return said
    said = made.pop("content", None)
    for name in _SAID:
        if made.get(name) in _EMPTY:
            made.pop(name, None)
    if said is None and not any(made.get(name) for name in (*_ELSEWHERE, *_BESIDE, _MEDIA_BEFORE)):
        others = sorted(
            name
            for name, one in made.items()
            if isinstance(one, str | list | dict) and one and name not in {"role", *IDLE}
        )
        if others and "tool_call_id" not in others:
            raise InvalidRequest(
                f"{where} has no content, but {', '.join(map(plain_name, others[:_MOST_NAMES]))}"
            )
    return said


def _call(call: Any, where: str) -> dict[str, Any]:
    """Give a call with its arguments as an object, which is what templates expect."""
    inner = call.get("function") or call.get("custom") or call if isinstance(call, dict) else None
    if not isinstance(inner, dict):
        raise InvalidRequest(f"{where}: a tool call is {_show(call)}; it takes an object")
    if not isinstance(inner.get("name"), str) or not inner["name"]:
        raise InvalidRequest(f"{where}: a tool call names no function")
    arguments = inner.get("arguments", inner.get("input") if "custom" in call else None)
    if isinstance(arguments, str):
        with suppress(ValueError):  # what a model wrote need not be JSON
            arguments = json.loads(arguments) if arguments.strip() else {}
    known = {key: value for key, value in call.items() if key != "function" and value is not None}
    if inner is call:
        known = {"type": "function"}
    function = {**inner, "arguments": {} if arguments is None else arguments}
    return {**known, "function": function}


def _content(value: Any, name: str, left_out: list[str]) -> str | list[dict[str, Any]] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return _whole(value, name)
    if isinstance(value, dict) and isinstance(value.get("parts"), list):
        value = value["parts"]
    elif isinstance(value, dict) and isinstance(value.get("type"), str):
        value = [value]
    if not isinstance(value, list):
        raise InvalidRequest(f"{name} is {_show(value)}; it takes a text, a list of parts, or null")
    parts: list[dict[str, Any]] = []
    for part in value:
        if isinstance(part, str):
            parts.append({"type": "text", "text": _whole(part, name)})
            continue
        if not isinstance(part, dict):
            raise InvalidRequest(f"{name} holds {_show(part)}; a part is an object")
        if _HELD in part:
            parts.append({"type": part["type"], "digest": part[_HELD]})
            continue
        kind = part.get("type") or next((one for one in ("text", *_MEDIA) if one in part), None)
        if not isinstance(kind, str):
            raise InvalidRequest(f"{name} holds a part of type {_show(kind)}; it takes a text")
        if kind in _TEXTS:
            text = part.get("refusal" if kind == "refusal" else "text", part.get("content"))
            if text is None and "text" not in part and part.keys() - _ABOUT_PARTS:
                raise InvalidRequest(f"{name} holds a part of type {_show(kind)} without a text")
            if text is not None and not isinstance(text, str):
                raise InvalidRequest(f"{name}: a part's text is {_show(text)}; it takes a text")
            parts.append({"type": "text", "text": _whole(text or "", name)})
        elif kind in _MEDIA:
            medium = _MEDIA[kind]
            parts.append({"type": medium, "digest": _digest(medium, part, kind)})
        elif kind in _THOUGHTS:
            left_out.append("thoughts")
        else:
            raise InvalidRequest(
                f"{name} holds a part of type {_show(kind)}, which is not known; known are "
                f"{', '.join(sorted({*_TEXTS, *_MEDIA, *_THOUGHTS}))}, tool_use and tool_result"
            )
    return parts


def _digest(medium: str, part: dict[str, Any], kind: str) -> str:
    """Name a medium by its content: the same in every form that it may be logged in.

    Raises:
        InvalidRequest: it has none.
    """
    found = _source(part, kind)
    if found in _EMPTY:
        raise InvalidRequest(f"{kind} has no content: a url, data, an id")
    if not isinstance(found, str):
        found = json_text(found, sort_keys=True)
    if found.startswith("data:"):
        found = found.partition(",")[2]
    held = part.get(kind)
    inside = held if isinstance(held, dict) else {}
    told = {
        name: one for name in _SETTINGS if (one := inside.get(name, part.get(name))) is not None
    }
    if told.pop("detail", "auto") != "auto":
        told["detail"] = inside.get("detail", part.get("detail"))
    if told:
        found += "\0" + json_text(told, sort_keys=True)
    seen = blake2b(found.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{medium}:{seen}"


def _source(part: dict[str, Any], kind: str) -> Any:
    """Give what a medium is: its data, where it lies, its name; empty if it does not say."""
    found: Any = part.get(kind)
    if found is None:
        found = {name: one for name, one in part.items() if name != kind}
    for _ in range(_DEEPEST):
        if not isinstance(found, dict):
            break
        inner = next((found[name] for name in _SOURCES if found.get(name) is not None), None)
        if inner is None:
            found = {
                name: one
                for name, one in found.items()
                if name not in _NO_CONTENT and one not in _EMPTY
            }
            break
        found = inner
    return part.get("uuid") if found in _EMPTY else found


def _flag(fields: dict[str, Any], name: str, *, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {_show(value)}; it takes true or false")
    return value


def _whole(text: str, name: str) -> str:
    """Pass a text on.

    Raises:
        InvalidRequest: it holds half a character, which JSON can escape and no text has.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"{name} holds half a character (U+D800 to U+DFFF): that is no text"
        ) from None
    return text


def _show(value: Any) -> str:
    """Name a value in a message: what it is, and of what type."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"a list of {len(value):,}" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**18:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str):
        return ascii(value if len(value) <= 40 else value[:40] + "...")
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
