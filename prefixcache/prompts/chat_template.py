"""A model's chat template, which is somebody else's program: run in a sandbox, within bounds.

It writes what `apply_chat_template` of transformers writes.  Where templates differ in what they
can take (a list of parts or only text, null beside a tool call), the template itself is asked once,
with a probe.

| bound | |
|---|---|
| `LONGEST_TEXT` | characters of a prompt, and of any text on the way to it |
| `MOST_STEPS` | turns of loops and calls |
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple

from prefixcache.errors import InvalidRequest
from prefixcache.prompts.logged_request import LoggedRequest, plain_name, stand_in
from prefixcache.types import pack

LONGEST_TEXT: Final = 64 << 20
MOST_STEPS: Final = 2_000_000
_LOOKS: Final = 64
"""Times that a prompt is read to see whether all messages are in it."""
_PROBE: Final = "zwischenruf"
_RESERVED: Final = {"messages", "tools", "documents", "add_generation_prompt"}

Encode = Callable[[str, bool], Sequence[int]]
"""From a text, and whether the model's own special tokens go around it, to token ids."""


class Prompt(NamedTuple):
    """A request's prompt."""

    tokens: bytes
    """Packed."""
    left_out: Counter[str]
    """What of the request is not in it, as nouns: `tools that the template does not show`."""


class ChatTemplate:
    """One model's template.

    Args:
        source: In Jinja's language.
        special: The model's special tokens by name, such as `bos_token`.
        with_tools: What the model has for requests with tools, if another one.

    Raises:
        InvalidRequest: it is no template, or jinja2 is missing.
    """

    def __init__(
        self, source: str, special: Mapping[str, str], with_tools: str | None = None
    ) -> None:
        from prefixcache.prompts.template_sandbox import Sandbox

        self._with_tools = None if with_tools is None else ChatTemplate(with_tools, special)
        self._sandbox = Sandbox(source, LONGEST_TEXT, MOST_STEPS)
        self._special = dict(special)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], template: str | None = None) -> ChatTemplate:
        """Make that of a `tokenizer_config.json`; `template` replaces the one in it.

        Raises:
            InvalidRequest: it has none.
        """
        special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in config.items()
            if name.endswith("_token")
            and isinstance(value.get("content") if isinstance(value, dict) else value, str)
        }
        source: Any = template or config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {
                one["name"]: one.get("template")
                for one in source
                if isinstance(one, dict) and isinstance(one.get("name"), str)
            }
        with_tools = None
        if isinstance(source, dict):
            source, with_tools = source.get("default"), source.get("tool_use")
        if not isinstance(source, str):
            raise InvalidRequest("the model has no chat template; give text or token ids")
        return cls(source, special, with_tools if isinstance(with_tools, str) else None)

    def render(self, request: LoggedRequest) -> tuple[str, dict[str, str], Counter[str]]:
        """Write a chat's prompt; give it, the digests of media by their marks in it, what it lacks.

        Raises:
            InvalidRequest: the template refuses, or goes beyond its bounds.
        """
        if request.tools and self._with_tools is not None:
            return self._with_tools.render(request)
        media: dict[str, str] = {}
        nonce = secrets.token_hex(8)

        def mark(digest: str) -> str:
            name = f"\ue000{nonce}:{len(media)}\ue001"
            media[name] = digest
            return name

        messages = [self._fitted(one, mark) for one in request.messages]
        options = {key: value for key, value in request.options.items() if key not in _RESERVED}
        text = self._write(
            messages,
            tools=list(request.tools) or None,
            documents=list(request.documents) or None,
            add_generation_prompt=request.generation_prompt,
            **options,
        )
        if request.continues:
            text = _cut_after(text, _text_of(messages[-1]))
        return text, media, self._missing(request, messages, text)

    def written_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Write a chat with a call of a tool, to see how; '' if tools or calls are not shown."""
        if self._with_tools is not None:
            return self._with_tools.written_call(name, arguments)
        tool = {"name": _PROBE, "description": _PROBE, "parameters": {"type": "object"}}
        tools = [{"type": "function", "function": tool}]
        asked = {"role": "user", "content": "?"}
        function = {"name": name, "arguments": dict(arguments)}
        call = {"id": "123456789", "type": "function", "function": function}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            shown = self._write([asked], tools=tools, add_generation_prompt=True)
            called = self._write([asked, calling], tools=tools, add_generation_prompt=False)
        except InvalidRequest:
            return ""
        return called if _PROBE in shown else ""

    def _write(self, messages: list[dict[str, Any]], /, **context: Any) -> str:
        given = {"tools": None, "documents": None, **self._special, **context}
        return self._sandbox.render({"messages": messages, **given})

    def _fitted(self, message: dict[str, Any], mark: Callable[[str], str]) -> dict[str, Any]:
        """Give a message as this template takes it."""
        content = message["content"]
        if content is None:
            return {**message, "content": None if self._takes_null else ""}
        if isinstance(content, list):
            parts = [
                one if one["type"] == "text" else {"type": "text", "text": mark(one["digest"])}
                for one in content
            ]
            if self._takes_parts:
                return {**message, "content": parts}
            return {**message, "content": "\n".join(one["text"] for one in parts)}
        if not self._takes_text and self._takes_parts:
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    @cached_property
    def _takes_parts(self) -> bool:
        text = self._probe([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
        return _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text

    @cached_property
    def _takes_text(self) -> bool:
        return _PROBE in self._probe([{"role": "user", "content": _PROBE}])

    @cached_property
    def _takes_null(self) -> bool:
        call = {"id": "123456789", "type": "function"}
        call["function"] = {"name": "f", "arguments": {}}  # type: ignore[assignment]
        asked = {"role": "user", "content": _PROBE}
        calling = {"role": "assistant", "content": None, "tool_calls": [call]}
        text = self._probe([asked, calling])
        return _PROBE in text and "None" not in text and "null" not in text

    def _probe(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self._write(messages, add_generation_prompt=False)
        except InvalidRequest:
            return ""

    def _missing(
        self, request: LoggedRequest, messages: list[dict[str, Any]], text: str
    ) -> Counter[str]:
        missing = Counter(request.left_out)
        names = self._sandbox.names
        if request.tools and "tools" not in names:
            missing["tools that the template does not show"] += 1
        if request.documents and "documents" not in names:
            missing["documents that the template does not show"] += 1
        for key in request.options:
            if key in _RESERVED or key not in names:
                missing["options that the template does not know"] += 1
                break
        if any("tool_calls" in one for one in messages) and "tool_calls" not in self._sandbox.words:
            missing["tool calls that the template does not show"] += 1
        if not _shows_all(text, messages):
            missing["messages that the template does not show in full"] += 1
        if request.messages and any(_has_media(one) for one in request.messages):
            missing["images or files, which are counted as stand-ins of 256 tokens"] += 1
        return missing


def prompt_of(
    request: LoggedRequest, template: Callable[[], ChatTemplate], encode: Encode
) -> Prompt:
    """Turn a logged request into the tokens that a server would compute.

    Args:
        request: See `read_logged`.
        template: Gives the model's template; called for a chat only.
        encode: The model's tokenizer.

    Raises:
        InvalidRequest: there is no template, it refuses, or nothing is left.
    """
    left_out = Counter(request.left_out)
    if request.tokens is not None:
        tokens = request.tokens
    elif request.text is not None:
        tokens = pack(encode(request.text, True))
    else:
        text, media, left_out = template().render(request)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(
                "a tool, a call, a document or an option holds half a character (U+D800 to "
                "U+DFFF): that is no text"
            ) from None
        tokens = _with_media(text, media, encode)
    if not tokens:
        raise InvalidRequest("the prompt is empty")
    if request.unread:
        left_out[f"fields that are not read: {', '.join(map(plain_name, request.unread))}"] += 1
    return Prompt(tokens, left_out)


def _with_media(text: str, media: Mapping[str, str], encode: Encode) -> bytes:
    if not media:
        return pack(encode(text, False))
    begin = next(iter(media)).partition(":")[0]
    parts = re.split(f"({begin}:[0-9]+\ue001)", text)
    return b"".join(
        stand_in(media[part]) if part in media else pack(encode(part, False))
        for part in parts
        if part
    )


def _has_media(message: Mapping[str, Any]) -> bool:
    content = message["content"]
    return isinstance(content, list) and any(one["type"] != "text" for one in content)


def _text_of(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, list):
        return str(content[-1]["text"]) if content else ""
    return content or ""


def _shows_all(text: str, messages: Iterable[Mapping[str, Any]]) -> bool:
    """Whether each message's words are in a text.  O(characters).

    Those of one speaker are looked for one behind the other, as templates write them.  Where they
    stand otherwise so often that looking would take long, it counts as no.
    """
    behind: Counter[str] = Counter()
    left = _LOOKS * (len(text) + 1)
    for one in messages:
        words, speaker = _text_of(one).strip(), str(one.get("role"))
        start = behind[speaker]
        at = text.find(words, start)
        left -= (len(text) if at < 0 else at) - start
        if at >= 0:
            behind[speaker] = at + len(words)
        else:
            at = text.find(words, 0, start + len(words))
            left -= start
        if at < 0 or left < 0:
            return False
    return True


def _cut_after(text: str, last: str) -> str:
    """Leave out what the template writes behind the last message."""
    at = text.rfind(last.strip()) if last.strip() else -1
    if at < 0:
        raise InvalidRequest(
            "continue_final_message needs a last message that the template writes as it is"
        )
    whole = last.lstrip()
    kept = whole if text.startswith(whole, at) else last.strip()
    return text[: at + len(kept)]


def tell(left_out: Mapping[str, int], count: int) -> Iterable[str]:
    """Say what was left out, a sentence for each kind.

    >>> list(tell({"tools that the template does not show": 6}, 8))
    ['6 of 8 requests have tools that the template does not show']
    """
    for kind, number in sorted(left_out.items()):
        if count == 1:
            yield f"the request has {kind}"
        else:
            yield f"{number:,} of {count:,} requests have {kind}"
