"""Every field of a request's body, and what is done with it: no field is ever ignored in silence.

```
used       it has its effect
accepted   taken, and without effect here; the documents say so
refused    400, and the field's name; but for values that ask for nothing, such as a penalty of 0
```
What is not in the table is refused as unknown.  Null is as good as left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prefixcache.plain_json import json_text
from prefixcache.prompts.logged_request import plain_name
from prefixcache_serving.refusals import Refused

USED, ACCEPTED, REFUSED = "used", "accepted", "refused"
CHAT, COMPLETIONS, RESPONSES = "chat", "completions", "responses"

Check = Callable[[Any, str], Any]
"""From a value and its field's name to what is meant; raises Refused."""

_MOST_STOPS: Final = 16
_LONGEST_STOP: Final = 1024
_MOST_BIASED: Final = 1024
LOGPROBS: Final = "message.output_text.logprobs"
_THOUGHTS: Final = "reasoning.encrypted_content"
MOST_ANSWERS: Final = 128
"""Answers to one request, over all of its prompts."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field."""

    name: str
    effect: str
    what: str
    """What it does, or why it cannot; for people."""
    bodies: tuple[str, ...]
    check: Check
    harmless: tuple[Any, ...] = ()
    """Values of a refused field that ask for nothing."""

    def asks_for_nothing(self, value: Any) -> bool:
        """Whether a refused field has a value that changes nothing."""
        return any(type(value) is type(one) and value == one for one in self.harmless)


def wrong(name: str, value: Any, takes: str) -> Refused:
    """Make the refusal of a value: what it is and what is taken."""
    return Refused(f"{name} is {show(value)}; it takes {takes}", param=name, code="invalid_value")


def show(value: Any) -> str:
    """Name a value in a message, in a few words."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int) and abs(value) > 10**18:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str):
        return ascii(value if len(value) <= 40 else value[:40] + "...")
    return repr(value)


def inside(where: str, name: str) -> str:
    """Name what stands in an object under a name of a client's: shortly, and as it can be shown."""
    return f"{where}.{plain_name(name)}"


def anything(value: Any, name: str) -> Any:
    """Take whatever it is: for what is read elsewhere."""
    return value


def flag(value: Any, name: str) -> bool:
    """Take true or false."""
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def whole(least: int, most: int) -> Check:
    """Take a whole number within bounds."""

    def check(value: Any, name: str) -> int:
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)  # JSON knows one kind of number
        if type(value) is not int or not least <= value <= most:
            raise wrong(name, value, f"a whole number from {least:,} to {most:,}")
        return value

    return check


def number(least: float, most: float) -> Check:
    """Take a number within bounds."""

    def check(value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(name, value, f"a number from {least:g} to {most:g}")
        if not least <= value <= most or not math.isfinite(value):
            raise wrong(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    return check


def is_text(value: str) -> bool:
    """Whether no half of a character is in it, which JSON can write, and no text can have."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def text(longest: int, least: int = 0) -> Check:
    """Take a text of so many characters."""

    def check(value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise wrong(name, value, "a text")
        if not least <= len(value) <= longest:
            raise wrong(name, value, f"a text of {least:,} to {longest:,} characters")
        if not is_text(value):
            raise Refused(
                f"{name} holds half a character (U+D800 to U+DFFF): that is no text",
                param=name,
                code="invalid_value",
            )
        return value

    return check


def one_of(*words: str) -> Check:
    """Take one of some words."""

    def check(value: Any, name: str) -> str:
        if value not in words or not isinstance(value, str):
            raise wrong(name, value, " or ".join(words))
        return value

    return check


def early_stopping(value: Any, name: str) -> bool | str:
    """Take when a beam search ends."""
    return value if value == "never" else flag(value, name)


def object_(value: Any, name: str) -> dict[str, Any]:
    """Take an object."""
    if not isinstance(value, dict):
        raise wrong(name, value, "an object")
    return value


def stops(value: Any, name: str) -> tuple[str, ...]:
    """Take a text, or some of them."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or len(given) > _MOST_STOPS:
        raise wrong(name, value, f"a text or up to {_MOST_STOPS} of them")
    return tuple(text(_LONGEST_STOP, least=1)(one, name) for one in given)


def stream_options(value: Any, name: str) -> bool:
    """Take the options of a stream; give whether it ends with the usage."""
    for key, one in object_(value, name).items():
        if key not in ("include_usage", "include_obfuscation"):
            raise Refused(
                f"unknown field {show(key)} in {name}",
                param=inside(name, key),
                code="unknown_field",
            )
        if one is not None:
            flag(one, inside(name, key))
    return value.get("include_usage") is True


def stream_obfuscation(value: Any, name: str) -> None:
    """Take the options of a stream of events, which always tells its usage."""
    for key, one in object_(value, name).items():
        if key != "include_obfuscation":
            raise Refused(
                f"unknown field {show(key)} in {name}",
                param=inside(name, key),
                code="unknown_field",
            )
        if one is not None:
            flag(one, inside(name, key))


def included(value: Any, name: str) -> bool:
    """Take what an answer is to have besides; give whether that is its log-probabilities."""
    if not isinstance(value, list):
        raise wrong(name, value, "a list")
    for one in value:
        if one not in (LOGPROBS, _THOUGHTS):
            raise wrong(name, one, f"{LOGPROBS}, or {_THOUGHTS}, of which there are none")
    return LOGPROBS in value


def only(**taken: Any) -> Check:
    """Take an object of settings, each of which can have one value, which is how it is anyway."""

    def check(value: Any, name: str) -> dict[str, Any]:
        for key, one in object_(value, name).items():
            if one is None or (key in taken and one == taken[key]):
                continue
            where = inside(name, key)
            if key in taken:
                raise Refused(
                    f"{where} is not served otherwise than {json_text(taken[key])}",
                    param=where,
                    code="unsupported_field",
                )
            raise Refused(f"unknown field {show(key)} in {name}", param=where, code="unknown_field")
        return dict(value)

    return check


def text_options(value: Any, name: str) -> dict[str, Any]:
    """Take what a response's text is to be like; its format is read elsewhere."""
    kept = {key: one for key, one in object_(value, name).items() if one is not None}
    form = object_(kept.pop("format", {"type": "text"}), f"{name}.format")
    only(verbosity="medium")(kept, name)
    return {"format": form, **kept}


def biases(value: Any, name: str) -> dict[str, float]:
    """Take numbers by token id."""
    if len(object_(value, name)) > _MOST_BIASED:
        raise wrong(name, f"{len(value):,} of them", f"at most {_MOST_BIASED:,}")
    for token in value:
        if not (token.isascii() and token.isdecimal() and len(token) <= 10):
            raise Refused(f"{name} names {show(token)}; it takes token ids", param=name)
        if token != str(int(token)):
            raise Refused(
                f"{name} names {show(token)}; write {int(token)}: one may be there twice otherwise",
                param=name,
            )
    return {token: number(-100, 100)(bias, name) for token, bias in value.items()}


def texts_by_name(value: Any, name: str) -> dict[str, Any]:
    """Take metadata: texts by name."""
    for key, one in object_(value, name).items():
        text(512)(one, inside(name, key))
    return dict(value)


BOTH: Final = (CHAT, COMPLETIONS)
ALL: Final = (*BOTH, RESPONSES)
_SEED: Final = whole(-(2**63), 2**63 - 1)
_TOKENS: Final = whole(1, 2**31 - 1)
_NONE_TOO: Final = whole(0, 2**31 - 1)
_NOTHING_STORED: Final = "nothing is stored"
_TOP_K: Final = whole(-1, 2**31 - 1)
_PENALTY: Final = number(-2, 2)


def _rows() -> list[Field]:
    def used(name: str, what: str, check: Check, bodies: tuple[str, ...] = ALL) -> Field:
        return Field(name, USED, what, bodies, check)

    def accepted(name: str, what: str, check: Check, bodies: tuple[str, ...] = ALL) -> Field:
        return Field(name, ACCEPTED, what, bodies, check)

    def refused(name: str, why: str, *harmless: Any, bodies: tuple[str, ...] = (CHAT,)) -> Field:
        return Field(name, REFUSED, why, bodies, anything, harmless)

    chat, completions, responses = (CHAT,), (COMPLETIONS,), (RESPONSES,)
    chats = (CHAT, RESPONSES)
    return [
        used("model", "the served model's name", text(1024)),
        used("messages", "through the model's template; parts of text", anything, chat),
        used("prompt", "a text, token ids, or a list of either", anything, completions),
        used("input", "a text, or items: messages, calls, their outputs", anything, responses),
        used("instructions", "a system message before them", text(2**31), responses),
        used("max_completion_tokens", "how long the answer may become", _TOKENS, chat),
        used("max_output_tokens", "how long the answer may become", _TOKENS, responses),
        used("max_tokens", "the same, by its older name", _TOKENS, chat),
        used("max_tokens", "how long the answer may become; 0 with echo", _NONE_TOO, completions),
        used("temperature", "0 takes the most likely token; 1 by default", number(0, 2)),
        used("top_p", "the nucleus that is drawn from", number(0, 1)),
        used(
            "n", "answers to each prompt; the prompt is computed once", whole(1, MOST_ANSWERS), BOTH
        ),
        used("seed", "the same seed, the same answer, on any worker", _SEED),
        used("stop", f"up to {_MOST_STOPS} texts; none of them is ever shown", stops),
        used("stream", "server-sent events", flag),
        used(
            "stream_options",
            "include_usage; include_obfuscation has no effect",
            stream_options,
            BOTH,
        ),
        accepted(
            "stream_options", "include_obfuscation has no effect", stream_obfuscation, responses
        ),
        used("logprobs", "of each token", flag, chat),
        used("logprobs", "of each token and of so many more", whole(0, 5), completions),
        used("top_logprobs", "of the most likely tokens; with logprobs", whole(0, 20), chat),
        used("echo", "the prompt before its answer; with logprobs of both", flag, completions),
        used(
            "best_of",
            "of so many answers the n whose tokens are the likeliest on average; not as a stream",
            whole(1, MOST_ANSWERS),
            completions,
        ),
        used("include", f"{LOGPROBS}; {_THOUGHTS} has no effect", included, responses),
        used("top_logprobs", f"likewise; with {LOGPROBS}", whole(0, 20), responses),
        used("use_beam_search", "the n likeliest answers as a whole (of vLLM)", flag, BOTH),
        used("length_penalty", "with it: above 0 longer ones win (of vLLM)", number(-10, 10), BOTH),
        used("early_stopping", "with it: true, false, 'never' (of vLLM)", early_stopping, BOTH),
        used("frequency_penalty", "of what the answer has", _PENALTY),
        used("presence_penalty", "likewise", _PENALTY),
        used("logit_bias", "by token id, from -100 to 100", biases),
        used("top_k", "0 and -1 are all (of vLLM)", _TOP_K),
        used("min_p", "of the most likely one's share (of vLLM)", number(0, 1)),
        used("repetition_penalty", "from 0.01; 1 is none (of vLLM)", number(0.01, 100)),
        used("min_tokens", "before it nothing ends the answer (of vLLM)", whole(0, 2**31 - 1)),
        used("cache_salt", "who has another one shares nothing (of vLLM)", text(1024, 1)),
        used("segments", "reuse at other places too, approximately: segments.md (ours)", flag),
        used("ignore_eos", "go on behind the model's own end (of vLLM)", flag),
        used(
            "response_format", "the answer is held to it: json_schema, json_object", object_, chat
        ),
        used("text", "format: as response_format; verbosity medium", text_options, responses),
        used("tools", "functions; what is called, and how, is enforced", anything, chats),
        used("tool_choice", "none, auto, required, one by name, allowed_tools", anything, chats),
        used("parallel_tool_calls", "false: one call at most; true", flag, chats),
        used("chat_template_kwargs", "options of the template (of vLLM)", object_, chats),
        used("add_generation_prompt", "begin an answer; true (of vLLM)", flag, chat),
        used("continue_final_message", "go on with the last message (of vLLM)", flag, chat),
        accepted("user", "nobody is told", text(1024)),
        accepted("safety_identifier", "nobody is told", text(64), chats),
        accepted("metadata", "nothing is stored", texts_by_name, chat),
        used("metadata", "told again with the answer; nothing is stored", texts_by_name, responses),
        accepted("store", "nothing is stored", flag, chat),
        accepted("service_tier", "there is one", one_of("auto", "default"), chats),
        accepted("prompt_cache_key", "no routing is needed: all share one pool", text(1024), chats),
        accepted("prompt_cache_retention", "what is used stays longest", text(64), chats),
        accepted("max_tool_calls", "no tools are built in", whole(1, 2**31 - 1), responses),
        accepted(
            "reasoning",
            "effort none: the model has no such setting",
            only(effort="none"),
            responses,
        ),
        refused("suffix", "the model goes on with a text, it fills none", "", bodies=completions),
        refused("stop_token_ids", "give texts in stop", [], bodies=ALL),
        refused("functions", "tools is what they are called now", []),
        refused("function_call", "tool_choice is what it is called now", "none"),
        refused("modalities", "the model writes text", ["text"]),
        refused("audio", "the model writes text"),
        refused("prediction", "drafts are not taken"),
        refused("reasoning_effort", "the model has no such setting", "none"),
        refused("verbosity", "the model has no such setting", "medium"),
        refused("web_search_options", "nothing is searched"),
        *_of_responses(),
    ]


def _of_responses() -> list[Field]:
    """What else OpenAI's responses have, most of which needs a memory of earlier ones."""

    def refused(name: str, why: str, *harmless: Any) -> Field:
        return Field(name, REFUSED, why, (RESPONSES,), anything, harmless)

    return [
        refused("store", f"{_NOTHING_STORED}; it is false by default", False),
        refused("previous_response_id", f"{_NOTHING_STORED}: send all of the input"),
        refused("conversation", f"{_NOTHING_STORED}: send all of the input"),
        refused("background", f"{_NOTHING_STORED}: wait for the answer, or stream it", False),
        refused("prompt", f"{_NOTHING_STORED}: send instructions and input"),
        refused("context_management", "send what the model is to read"),
        refused("truncation", "what is too long is refused", "disabled"),
    ]


FIELDS: Final = tuple(_rows())
"""The table, in the order in which the documents show it."""

OF: Final[Mapping[str, Mapping[str, Field]]] = {
    body: {field.name: field for field in FIELDS if body in field.bodies} for body in ALL
}


def read(body: Any, kind: str) -> dict[str, Any]:
    """Check a body field by field; give what is used.

    Args:
        body: parsed JSON.
        kind: `chat`, `completions` or `responses`.

    Raises:
        Refused: it is no object, or a field is unknown, wrong, or not served; the message and
            `param` name it.
    """
    if not isinstance(body, dict):
        raise Refused(f"the body is {show(body)}; it takes an object", code="invalid_value")
    found: dict[str, Any] = {}
    for name, value in body.items():
        field = OF[kind].get(name)
        if field is None:
            raise Refused(
                f"unknown field {show(name)}: it would have no effect here. The fields are listed "
                "in docs/serving.md",
                param=plain_name(name),
                code="unknown_field",
            )
        if value is None or (field.effect == REFUSED and field.asks_for_nothing(value)):
            continue
        if field.effect == REFUSED:
            raise Refused(
                f"{name} is not served: {field.what}", param=name, code="unsupported_field"
            )
        checked = field.check(value, name)
        if field.effect == USED:
            found[name] = checked
    return found


def table() -> str:
    """Write the table for the documents, in Markdown."""
    lines = ["| field | of | | |", "|---|---|---|---|"]
    for field in FIELDS:
        of = "all" if field.bodies == ALL else ", ".join(field.bodies)
        harmless = ""
        if field.harmless:
            harmless = f"; {' or '.join(map(show, field.harmless))} is taken"
        lines.append(f"| `{field.name}` | {of} | {field.effect} | {field.what}{harmless} |")
    return "\n".join(lines)
