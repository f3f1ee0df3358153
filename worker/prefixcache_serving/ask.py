"""A request as it is asked of the workers: prompts as tokens, how many answers, how chosen.

```
body ──► fields.read ──► prompts: template, tokenizer ──► Ask ──► one Journey per answer
```
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Final

from prefixcache.errors import CacheError
from prefixcache.prompts.chat_template import Prompt
from prefixcache.prompts.logged_request import read_logged
from prefixcache.types import unpack
from prefixcache_serving import responses
from prefixcache_serving.answer_form import JsonForm, grammar_of, read_form
from prefixcache_serving.call_form import HERMES, CallForm, told_messages
from prefixcache_serving.content import TEXT, read_content, refuse_others
from prefixcache_serving.fields import (
    CHAT,
    COMPLETIONS,
    LOGPROBS,
    MOST_ANSWERS,
    RESPONSES,
    read,
    show,
    text,
    wrong,
)
from prefixcache_serving.refusals import Refused, refusal_of
from prefixcache_serving.served_model import ServedModel
from prefixcache_serving.tools import ToolUse, read_use

DEFAULT_CHAT_TOKENS: Final = 1024
"""How long a chat's answer may become unless asked: a small model may never end by itself."""
DEFAULT_COMPLETION_TOKENS: Final = 16
"""OpenAI's."""

MOST_SCORES: Final = 1 << 19
"""Log-probabilities that are told of one request: of its answers' tokens, and of the likeliest
beside each.  They are held until the answer is whole, some hundred bytes each."""

_RESULTS: Final = ("tool", "function")
_ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
_KEYS: Final = ("role", "content", "name", "refusal", "tool_calls", "tool_call_id")
_PARTS: Final = {"text": "text", "refusal": "refusal"}
"""Where a part of a message has its text."""
_BESIDE_A_TEXT: Final = ("cache_control",)
"""What a part may have besides: everything is cached anyway."""
_HOW: Final = (
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"),
    *("top_k", "min_p", "min_tokens"),
)
_HOW_LONG: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_SOURCES: Final = {CHAT: "messages", COMPLETIONS: "prompt", RESPONSES: "input"}
"""Where a body has its prompt."""
_BESIDE_BEAMS: Final[dict[str, tuple[Any, ...]]] = {
    "temperature": (0, 1),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "stop": ((),),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stream": (False,),
    "echo": (False,),
}
"""Fields that do not go with a search for the likeliest answers, unless they ask for nothing."""
_UNKNOWN_OPTIONS: Final = "options that the template does not know"
_HARMLESS_LOSSES: Final = {"messages that the template does not show in full", "thoughts"}
"""What templates leave out by design, of earlier turns."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of the workers."""

    kind: str
    prompts: tuple[list[int], ...]
    num_answers: int
    """To each prompt."""
    num_tries: int
    """Answers that are made to each prompt; the best ones are given."""
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    num_logprobs: int | None
    """How many of the most likely tokens are told with each one; None: none, and not its own."""
    salt: str | None
    """Keeps the prompts of a tenant, and those behind a `cache_salt`, apart."""
    segments: bool
    """Whether what is stored of the prompts at other places may be used, approximately."""
    how: dict[str, Any]
    """What else decides the choice of a token, by the names that workers know."""
    ignore_eos: bool
    form: JsonForm | None
    """JSON that the answers must be."""
    form_field: str
    """Where it was asked for."""
    use: ToolUse | None
    """Tools that they may call."""
    calls: CallForm
    """How they call them."""
    grammar: dict[str, Any] | None
    """What workers hold them to because of these."""
    stream: bool
    include_usage: bool
    left_out: tuple[str, ...]
    """What of the messages the template does not show."""
    told_again: dict[str, Any] = field(default_factory=dict)
    """Fields of the request that its answer repeats."""
    echoes: tuple[str, ...] | None = None
    """The prompts' texts, where they are told before the answers."""
    is_long: bool = False
    """Whether it takes long to write what an answer repeats of it."""
    search: dict[str, Any] | None = None
    """How the likeliest answers are searched, by the names that workers know; None: they are drawn,
    or made token by token."""

    @property
    def num_choices(self) -> int:
        """Answers to each prompt that come from workers."""
        return self.num_tries if self.search is None else self.num_answers

    @property
    def scores_prompts(self) -> bool:
        """Whether log-probabilities of the prompts are told."""
        return self.echoes is not None and self.num_logprobs is not None

    def lines(self) -> list[dict[str, Any]]:
        """Give what a worker is sent for each answer, prompt by prompt, without an id."""
        more = dict(self.how) if self.search is None else dict(self.search)
        if self.salt is not None:
            more["salt"] = self.salt
        if self.segments:
            more["segments"] = True
        if self.ignore_eos:
            more["ignore_eos"] = True
        if self.grammar is not None:
            more["grammar"] = self.grammar
        if self.num_logprobs is not None:
            more |= {"logprobs": True, "top_logprobs": self.num_logprobs}
        elif self.num_tries > self.num_answers:
            more["logprobs"] = True
        if self.temperature > 0:
            more |= {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        scored = {"prompt_logprobs": self.num_logprobs} if self.scores_prompts else {}
        return [
            {"tokens": prompt, "max_new_tokens": self.max_new_tokens, **more}
            | ({"sample": sample} if sample and self.temperature > 0 else {})
            | ({} if sample else scored)
            for prompt in self.prompts
            for sample in range(self.num_tries)
        ]


def read_ask(body: Any, kind: str, model: ServedModel, tenant: str = "") -> Ask:
    """Turn a body into what is asked.  O(bytes); tokenises, so long ones belong into a thread.

    Args:
        body: parsed JSON.
        kind: `chat`, `completions` or `responses`.
        model: of whom it is asked.
        tenant: whose it is.

    Raises:
        Refused: with the field that it is about.
    """
    found = read(body, kind)
    if "model" not in found:
        raise Refused("you must name a model", param="model", code="missing_field")
    if found["model"] != model.name:
        raise Refused(
            f"the model {show(found['model'])} is not served here; {show(model.name)} is",
            param="model",
            code="model_not_found",
            status=404,
        )
    if "stream_options" in found and not found.get("stream"):
        raise Refused(
            "stream_options goes with stream: true", param="stream_options", code="invalid_value"
        )
    form_field, given = "response_format", found.get("response_format")
    if is_flat := kind == RESPONSES:
        form_field, given = "text.format", found.get("text", {}).get("format")
        _drop_what_goes_with_tools(found)
    use = read_use(found, is_flat=is_flat)
    form = None if given is None else read_form(given, form_field, is_flat=is_flat)
    calls = model.call_form or HERMES
    grammar = grammar_of(form, use, calls, form_field)
    source = _SOURCES[kind]
    left_out: tuple[str, ...] = ()
    if kind == COMPLETIONS:
        requests = _completion(found, model)
    elif kind == CHAT:
        requests, left_out = _chat(_messages(found), source, found, model, use)
    else:
        requests, left_out = _chat(responses.messages(found), source, found, model, use)
    num_answers, num_tries = _num_answers(found)
    if len(requests) * num_tries > MOST_ANSWERS:
        name = "best_of" if "best_of" in found else "n"
        raise Refused(
            f"{len(requests):,} prompts with {num_tries} answers each; at most {MOST_ANSWERS} "
            "answers to one request: send several",
            param=name if num_tries > 1 else source,
            code="invalid_value",
        )
    search = _search(found, num_answers, num_tries, model)
    if search is not None and grammar is not None:
        raise Refused(
            "answers that are held to a grammar are made token by token, not by use_beam_search",
            param="tools" if form is None else "response_format",
            code="invalid_value",
        )
    top_p = found.get("top_p", 1.0)
    new_tokens = _new_tokens(found, kind, source, max(map(len, requests)), model)
    num_logprobs = _logprobs(found, kind)
    if num_logprobs is not None:
        prompts = sum(map(len, requests)) if found.get("echo") else 0
        name = "include" if kind == RESPONSES else "logprobs"
        _check_scores(num_logprobs, len(requests) * num_tries * new_tokens + prompts, name)
    return Ask(
        kind=kind,
        prompts=tuple(requests),
        num_answers=num_answers,
        num_tries=num_tries if search is None else 1,
        max_new_tokens=new_tokens,
        # A nucleus of nothing still has its first token.
        temperature=found.get("temperature", 1.0) if top_p > 0 and search is None else 0.0,
        top_p=top_p or 1.0,
        seed=found.get("seed", secrets.randbits(63)),
        stop=found.get("stop", ()),
        num_logprobs=num_logprobs,
        salt=_salt(tenant, found.get("cache_salt", "")),
        segments=_segments(found, kind),
        how=_how(found, new_tokens, model),
        ignore_eos=found.get("ignore_eos", False),
        form=form,
        form_field=form_field,
        use=use,
        calls=calls,
        grammar=grammar,
        stream=found.get("stream", False),
        include_usage=found.get("stream_options", False),
        left_out=left_out,
        told_again=found if kind == RESPONSES else {},
        search=search,
        echoes=_echoes(found, requests, model) if found.get("echo") else None,
    )


def _drop_what_goes_with_tools(found: dict[str, Any]) -> None:
    """Take what responses say of tools by default for nothing, where there are none."""
    if not found.get("tools"):
        found.pop("parallel_tool_calls", None)
        if found.get("tool_choice") in ("auto", "none"):
            del found["tool_choice"]


def _num_answers(found: dict[str, Any]) -> tuple[int, int]:
    """Give how many answers are told of each prompt, and how many are made."""
    told = int(found.get("n", 1))
    made = int(found.get("best_of", told))
    why = ""
    if made < told:
        why = f"best_of is {made}, and n is {told}; it takes at least as many"
    elif made > told and found.get("stream") and not found.get("use_beam_search"):
        why = (
            f"best_of is {made}, and n is {told}: which are the best is known at their end, so "
            "they cannot be streamed"
        )
    if why:
        raise Refused(why, param="best_of", code="invalid_value")
    return told, made


def _search(
    found: dict[str, Any], told: int, width: int, model: ServedModel
) -> dict[str, Any] | None:
    """Read a beam search; what makes or tells single tokens does not go with it."""
    names: tuple[str, ...] = ("length_penalty", "early_stopping")
    terms = {name: found[name] for name in names if name in found}
    if not found.get("use_beam_search"):
        for name in terms:
            raise Refused(
                f"{name} goes with use_beam_search: true", param=name, code="invalid_value"
            )
        return None
    for name, neutral in _BESIDE_BEAMS.items():
        value = found.get(name, neutral[0])
        is_flag = isinstance(value, bool)
        if not any(value == one and isinstance(one, bool) == is_flag for one in neutral):
            raise Refused(
                f"{name} does not go with use_beam_search, which takes the likeliest answers as a "
                "whole, at their end",
                param=name,
                code="invalid_value",
            )
    if width > model.most_beams:
        raise Refused(
            f"{width} beams; a worker computes {model.most_beams} sequences at a time "
            "(prefixcache up --max-batch)",
            param="best_of" if "best_of" in found else "n",
            code="invalid_value",
        )
    return {"beams": width, "n": told, **terms}


def _echoes(found: dict[str, Any], prompts: list[list[int]], model: ServedModel) -> tuple[str, ...]:
    given = found["prompt"]
    texts = [given] if isinstance(given, str) else given
    return tuple(
        text if isinstance(text, str) else model.decoder.decode(prompt)
        for text, prompt in zip(
            texts if len(texts) == len(prompts) else [None], prompts, strict=True
        )
    )


def _salt(tenant: str, salt: str) -> str | None:
    """Make one secret of both; None where there is neither, so that all workers share."""
    if not (tenant or salt):
        return None
    digest = blake2b(digest_size=24, person=b"pfxcache-front")
    for part in (tenant.encode(), salt.encode()):
        digest.update(len(part).to_bytes(4, "little") + part)  # no two pairs give the same bytes
    return digest.hexdigest()


def _segments(found: dict[str, Any], kind: str) -> bool:
    if not found.get("segments"):
        return False
    if kind == COMPLETIONS and found.get("echo") and "logprobs" in found:
        raise Refused(
            "segments do not go with echo and logprobs, for which all of the prompt is computed",
            param="segments",
            code="invalid_value",
        )
    return True


def _logprobs(found: dict[str, Any], kind: str) -> int | None:
    if kind == COMPLETIONS:
        given: int | None = found.get("logprobs")
        return given
    asks, how = ("logprobs", "logprobs: true") if kind == CHAT else ("include", LOGPROBS)
    if found.get(asks):
        return int(found.get("top_logprobs", 0))
    if found.get("top_logprobs"):
        raise Refused(f"top_logprobs goes with {how}", param="top_logprobs", code="invalid_value")
    return None


def _check_scores(num_top: int, num_tokens: int, name: str) -> None:
    """Refuse more log-probabilities than can be held until an answer is whole."""
    if (1 + num_top) * num_tokens > MOST_SCORES:
        raise Refused(
            f"{1 + num_top} log-probabilities of up to {num_tokens:,} tokens; at most "
            f"{MOST_SCORES:,} to one request: ask for shorter answers, for fewer, or for less of "
            "each token",
            param=name,
            code="invalid_value",
        )


def _how(found: dict[str, Any], new_tokens: int, model: ServedModel) -> dict[str, Any]:
    how: dict[str, Any] = {name: found[name] for name in _HOW if name in found}
    if how.get("min_tokens", 0) > new_tokens:
        raise Refused(
            f"min_tokens is {how['min_tokens']:,}, and the answer may have {new_tokens:,}",
            param="min_tokens",
            code="invalid_value",
        )
    for token in how.get("logit_bias", ()):
        if int(token) >= model.vocab_size:
            raise Refused(
                f"logit_bias names {token}; token ids are from 0 to {model.vocab_size - 1:,}",
                param="logit_bias",
                code="invalid_value",
            )
    return how


def _new_tokens(
    found: dict[str, Any], kind: str, source: str, longest: int, model: ServedModel
) -> int:
    room = model.room(longest)
    names = [name for name in _HOW_LONG if name in found]
    wants_none = names == ["max_tokens"] and found["max_tokens"] == 0
    if wants_none and not found.get("echo"):
        raise Refused(
            "max_tokens is 0: there would be nothing to tell, unless the prompt is echoed",
            param="max_tokens",
            code="invalid_value",
        )
    if room < (0 if wants_none else 1):
        raise Refused(
            f"this model takes {model.max_tokens:,} tokens, prompt and answer together; the "
            f"prompt has {longest:,}",
            param=source,
            code="context_length_exceeded",
        )
    if len(names) == 2 and found[names[0]] != found[names[1]]:
        raise Refused(
            "max_completion_tokens and max_tokens differ; give one of them",
            param="max_tokens",
            code="invalid_value",
        )
    if not names:
        default = DEFAULT_COMPLETION_TOKENS if kind == COMPLETIONS else DEFAULT_CHAT_TOKENS
        return min(default, room)
    asked = int(found[names[0]])
    if asked > room:
        raise Refused(
            f"{names[0]} is {asked:,}; this model takes {model.max_tokens:,} tokens, and the "
            f"prompt has {longest:,}: at most {room:,}",
            param=names[0],
            code="context_length_exceeded",
        )
    return asked


def _messages(found: dict[str, Any]) -> list[dict[str, Any]]:
    if "messages" not in found:
        raise Refused("messages are missing", param="messages", code="missing_field")
    messages = found["messages"]
    if not isinstance(messages, list) or not messages:
        raise Refused(
            f"messages is {show(messages)}; it takes a list of at least one",
            param="messages",
            code="invalid_value",
        )
    return [_message(one, f"messages[{at}]") for at, one in enumerate(messages)]


def _chat(
    messages: list[dict[str, Any]],
    source: str,
    found: dict[str, Any],
    model: ServedModel,
    use: ToolUse | None,
) -> tuple[list[list[int]], tuple[str, ...]]:
    """Put messages through the template; `source` is the field that they came from."""
    options = ("chat_template_kwargs", "add_generation_prompt", "continue_final_message")
    given = {name: found[name] for name in options if name in found}
    checked = [one | {"role": "system"} if one["role"] == "developer" else one for one in messages]
    tools = [] if use is None else [one.shown for one in use.tools]
    try:
        made = _prompt(checked, tools, given, model)
    except CacheError as error:
        raise refusal_of(error, source) from None
    if lost := sorted(set(made.left_out) - _HARMLESS_LOSSES):
        raise Refused(
            f"this model's template cannot show everything: {', '.join(lost)}",
            param="chat_template_kwargs" if lost == [_UNKNOWN_OPTIONS] else source,
            code="unsupported_field",
        )
    return [unpack(made.tokens).tolist()], tuple(sorted(made.left_out))


def _prompt(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    given: dict[str, Any],
    model: ServedModel,
) -> Prompt:
    """Write the chat, tools and calls in the template's way, or, where it has none, in ours."""
    (logged,) = read_logged({"messages": messages, "tools": tools, **given})
    has_calls = any("tool_calls" in one or one["role"] in _RESULTS for one in messages)
    if model.call_form is None and (tools or has_calls):
        told = told_messages(logged.messages, logged.tools)
        logged = replace(logged, messages=tuple(told), tools=())
    return model.decoder.prompt(logged)


def _message(message: Any, where: str) -> dict[str, Any]:
    """Check one message more strictly than logs are read."""
    if not isinstance(message, dict):
        raise Refused(
            f"{where} is {show(message)}; it takes an object", param=where, code="invalid_value"
        )
    kept = {key: value for key, value in message.items() if value is not None}
    refuse_others(kept, where, *_KEYS)
    role = kept.get("role")
    if role not in _ROLES or not isinstance(role, str):
        raise Refused(
            f"{where}.role is {show(role)}; it takes {', '.join(_ROLES)}",
            param=f"{where}.role",
            code="invalid_value",
        )
    if "tool_calls" in kept:
        _check_calls(kept, where)
    if role != "assistant" and "content" not in kept:
        raise Refused(f"{where} has no content", param=f"{where}.content", code="missing_field")
    if "content" in kept:
        kept["content"] = read_content(kept["content"], f"{where}.content", _PARTS, _BESIDE_A_TEXT)
    for name, speaker in (("name", role), ("refusal", "assistant"), ("tool_call_id", "tool")):
        if name in kept:
            TEXT(kept[name], f"{where}.{name}")
            if role != speaker:
                raise Refused(
                    f"{where}.{name} goes with role: {speaker}",
                    param=f"{where}.{name}",
                    code="invalid_value",
                )
    return kept


def _check_calls(message: dict[str, Any], where: str) -> None:
    calls = message["tool_calls"]
    if message.get("role") != "assistant" or not isinstance(calls, list) or not calls:
        raise wrong(f"{where}.tool_calls", calls, "a list of calls, of the assistant's")
    for at, call in enumerate(calls):
        place = f"{where}.tool_calls[{at}]"
        kind = call.get("type", "function") if isinstance(call, dict) else None
        function = call.get("function") if isinstance(call, dict) else None
        if kind != "function" or not isinstance(function, dict):
            raise wrong(place, call, "a call of a function")
        refuse_others(call, place, "type", "id", "function", "index")  # their order says it
        refuse_others(function, f"{place}.function", "name", "arguments")
        if call.get("id") is not None:
            TEXT(call["id"], f"{place}.id")
        for name in ("name", "arguments"):
            text(2**31, least=name == "name")(function.get(name), f"{place}.function.{name}")


def _completion(found: dict[str, Any], model: ServedModel) -> list[list[int]]:
    if "prompt" not in found:
        raise Refused("a prompt is missing", param="prompt", code="missing_field")
    given = found["prompt"]
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list) or not given:
        raise Refused(
            f"prompt is {show(given)}; it takes a text, token ids, or a list of either",
            param="prompt",
            code="invalid_value",
        )
    if type(given[0]) is int:
        given = [given]
    if len(given) > MOST_ANSWERS:
        raise Refused(
            f"prompt holds {len(given):,} of them; at most {MOST_ANSWERS} at a time",
            param="prompt",
            code="invalid_value",
        )
    return [_tokens(one, model) for one in given]


def _tokens(prompt: Any, model: ServedModel) -> list[int]:
    if isinstance(prompt, str):
        try:
            tokens = model.decoder.encode(TEXT(prompt, "prompt"))
        except CacheError as error:
            raise refusal_of(error, "prompt") from None
        if not tokens:
            raise Refused("the prompt is empty", param="prompt", code="invalid_value")
        return tokens
    if not isinstance(prompt, list) or not prompt or set(map(type, prompt)) != {int}:
        raise Refused(
            f"prompt holds {show(prompt)}; it takes texts or lists of token ids",
            param="prompt",
            code="invalid_value",
        )
    if min(prompt) < 0 or max(prompt) >= model.vocab_size:
        raise Refused(
            f"prompt holds a token id that is none; they are from 0 to {model.vocab_size - 1:,}",
            param="prompt",
            code="invalid_value",
        )
    return prompt
