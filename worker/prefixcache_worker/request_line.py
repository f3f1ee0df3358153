"""A line of a worker's input as a request: every field is checked before anything happens.

```
id              a text of up to 200 characters, or a whole number; else one is made up
messages        a chat as servers log it; with it go tools, functions, documents, system,
                chat_template_kwargs, add_generation_prompt, continue_final_message
prompt          a text
tokens          token ids
max_new_tokens  a whole number from 1 (with prompt_logprobs from 0) to what the model takes; else
                128, or what there is room for
temperature     a number from 0 on; else 0, which takes the most likely token
top_p           a number above 0, up to 1; else 1
top_k           a whole number from -1 on; else 0, which is all tokens, as is -1
min_p           a number from 0 to 1; else 0
seed            a whole number of 64 bits; else another one every time
presence_penalty, frequency_penalty   a number from -2 to 2; else 0
repetition_penalty                    a number from 0.01 to 100; else 1
logit_bias      an object of up to 1,024 token ids with numbers from -100 to 100
min_tokens      a whole number from 0 to max_new_tokens; else 0
stop            a text or up to 1,024 of them
stop_ids        up to 1,024 token ids; else the model's own
ignore_eos      true: not the model's own; else false
logprobs        true or false; else false
top_logprobs    a whole number from 0 to 20, with logprobs; else 0
prompt_logprobs a whole number from 0 to 20: of the prompt, which is computed whole; else not
n               a whole number from 1 to 128: answers, each of which draws other numbers; else 1
beams           a whole number from 1 to 64: so many are searched, the n best told; else not
length_penalty  a number from -10 to 10, with beams; else 1
early_stopping  true, false or "never", with beams; else false
grammar         what the answer is held to: see `grammar`
generated       token ids: the beginning of the answer, which goes on behind them
sample          a whole number from 0 to 2,147,483,647: which of the answers to this seed; else 0
wait_s          seconds to wait for a prefix that another worker computes, from 0 on; else 30
waits_for_quota false: fail, and say when to come again, if a quota is full; else true
segments        true: what is stored of the prompt at other places may be used, approximately;
                else false
salt            a secret text of up to 200 characters: who has another one, or none, shares nothing
log_logits      true or false; else false
```
One of `messages`, `prompt` and `tokens` is there.  Null is as good as left out.
"""

from __future__ import annotations

import json
import math
import re
from itertools import count
from typing import Any, Final

from prefixcache.errors import InvalidRequest
from prefixcache.plain_json import once_each
from prefixcache.prompts.logged_request import read_logged
from prefixcache.texts import check_text
from prefixcache.types import unpack
from prefixcache_worker.beam_search import MOST_BEAMS, MOST_LENGTH_PENALTY, BeamSearch
from prefixcache_worker.grammar import read_grammar
from prefixcache_worker.model import Model
from prefixcache_worker.request import MOST_LOGPROBS, MOST_SAMPLES, Request
from prefixcache_worker.sampling import LEAST_REPETITION, MOST_REPETITION, Sampling

LONGEST_LINE: Final = 32 << 20
"""Bytes.  A prompt of a million token ids has a quarter of that."""
_LONGEST_ID: Final = 200
_MOST_STOPS: Final = 1024
_MOST_BIASED: Final = 1024
_TOKEN: Final = re.compile(r"\d{1,10}", re.ASCII)
_PROMPTS: Final = ("messages", "prompt", "tokens")
_CHAT: Final = {
    *("tools", "functions", "documents", "system", "chat_template_kwargs"),
    *("add_generation_prompt", "continue_final_message"),
}
_FIELDS: Final = {
    *("id", "max_new_tokens", "temperature", "top_p", "seed", "stop", "stop_ids", "wait_s"),
    *("log_logits", "generated", "sample", "top_k", "min_p", "presence_penalty"),
    *("frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens", "ignore_eos"),
    *("logprobs", "top_logprobs", "prompt_logprobs", "salt", "n", "beams", "length_penalty"),
    *("early_stopping", "grammar", "waits_for_quota", "segments", *_PROMPTS, *_CHAT),
}
_DEFAULT_NEW: Final = 128
_ID: Final = re.compile(rb'\s*\{\s*"id"\s*:\s*("(?:[^"\\]|\\.){0,200}"|\d{1,18})\s*[,}]')
_made_up = count(1)


def read_object(line: bytes) -> dict[str, Any]:
    """Read a line as a JSON object.

    Raises:
        InvalidRequest: it is none, or longer than `LONGEST_LINE`.
    """
    if len(line) > LONGEST_LINE:
        raise InvalidRequest(
            f"the line has more than {LONGEST_LINE:,} bytes, the most that one may"
        )
    try:
        fields = json.loads(line.decode("utf-8-sig"), object_pairs_hook=once_each)
    except RecursionError:
        raise InvalidRequest("the line is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"the line is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"a request is a JSON object, not {_show(fields)}")
    return {name: value for name, value in fields.items() if value is not None}


def name_of(line: bytes) -> str:
    """Give the id of a line that is no request, if it begins with one; else an empty text."""
    found = _ID.match(line[:1024])
    try:
        return "" if found is None else str(json.loads(found[1]))
    except ValueError:
        return ""


def read_id(fields: dict[str, Any], field: str = "id") -> str:
    """Give the id of a request; one is made up if it has none.

    Raises:
        InvalidRequest: it is neither a text nor a whole number, or too long.
    """
    value = fields.get(field)
    if value is None:
        return f"request-{next(_made_up)}"
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InvalidRequest(f"{field} is {_show(value)}; it takes a text or a whole number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise InvalidRequest(f"{field} is {_show(value)}; it takes one of 63 bits")
    name = _text(str(value), field, _LONGEST_ID)
    check_text(name, field)
    return name


def read_request(fields: dict[str, Any], model: Model) -> Request:
    """Turn the object of one line into a request.

    Raises:
        InvalidRequest: a field is missing, unknown, of the wrong type or out of range; the message
            names it, what it is and what it takes.
        Unsupported: text for a model without a tokenizer.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    if unknown := fields.keys() - _FIELDS:
        raise InvalidRequest(
            f"unknown fields {sorted(one[:40] for one in unknown)[:8]!a}; "
            f"known are {sorted(_FIELDS)}"
        )
    sources = [key for key in _PROMPTS if key in fields]
    if len(sources) != 1:
        raise InvalidRequest(f"one of messages, prompt and tokens is needed, not {sources}")
    if "messages" not in fields and (beside := sorted(fields.keys() & _CHAT)):
        raise InvalidRequest(f"{', '.join(beside)} go with messages, not with {sources[0]}")
    name = read_id(fields)
    tokens, left_out = _prompt(fields, sources[0], model)
    stop = fields.get("stop", [])
    return Request(
        id=name,
        tokens=tokens,
        max_new_tokens=_new_tokens(fields, len(tokens), model),
        sampling=Sampling(
            temperature=_number(fields, "temperature", 0.0),
            top_p=_number(fields, "top_p", 1.0),
            seed=_whole(fields["seed"], "seed", -(2**63), 2**63 - 1) if "seed" in fields else None,
            sample=_whole(fields.get("sample", 0), "sample", 0, 2**31 - 1),
            top_k=max(0, _whole(fields.get("top_k", 0), "top_k", -1, 2**31 - 1)),
            min_p=_number(fields, "min_p", 0.0, most=1.0),
            presence_penalty=_number(fields, "presence_penalty", 0.0, -2.0, 2.0),
            frequency_penalty=_number(fields, "frequency_penalty", 0.0, -2.0, 2.0),
            repetition_penalty=_number(
                fields, "repetition_penalty", 1.0, LEAST_REPETITION, MOST_REPETITION
            ),
            logit_bias=_logit_bias(fields.get("logit_bias", {})),
            min_tokens=_whole(fields.get("min_tokens", 0), "min_tokens", 0, 2**31 - 1),
        ),
        stop_ids=_stop_ids(fields),
        stop_strings=tuple(
            _text(one, "stop", 4096) for one in _list([stop] if isinstance(stop, str) else stop)
        ),
        wait_s=_number(fields, "wait_s", 30.0, most=86_400.0),
        waits_for_quota=_flag(fields, "waits_for_quota", default=True),
        segments=_flag(fields, "segments"),
        log_logits=_flag(fields, "log_logits"),
        logprobs=_logprobs(fields),
        prompt_logprobs=_prompt_logprobs(fields),
        n=_whole(fields.get("n", 1), "n", 1, MOST_SAMPLES),
        beams=_beams(fields),
        left_out=left_out,
        grammar=read_grammar(fields["grammar"]) if "grammar" in fields else None,
        generated=_generated(fields),
        salt=_salt(fields),
    )


def _prompt(fields: dict[str, Any], source: str, model: Model) -> tuple[list[int], tuple[str, ...]]:
    if source == "prompt" and not isinstance(fields["prompt"], str):
        raise InvalidRequest(
            f"prompt is {_show(fields['prompt'])}; it takes a text (token ids go into tokens)"
        )
    if source == "tokens" and fields["tokens"] == []:
        return [], ()
    found = read_logged({key: one for key, one in fields.items() if key in {source, *_CHAT}})
    if len(found) != 1:
        raise InvalidRequest(f"{source} holds {len(found)} prompts; a line asks for one")
    made = model.prompt(found[0])
    return unpack(made.tokens).tolist(), tuple(sorted(made.left_out))


def _new_tokens(fields: dict[str, Any], num_prompt: int, model: Model) -> int:
    room = model.max_tokens - num_prompt if model.max_tokens else 2**31 - 1
    if "max_new_tokens" not in fields:
        return max(1, min(_DEFAULT_NEW, room))
    least = 0 if "prompt_logprobs" in fields else 1
    asked = _whole(fields["max_new_tokens"], "max_new_tokens", least, 2**63 - 1)
    if asked > room > 0:
        raise InvalidRequest(
            f"max_new_tokens is {asked:,}; the model takes {model.max_tokens:,} tokens, and the "
            f"prompt has {num_prompt:,}: at most {room:,}"
        )
    return min(asked, 2**31 - 1)


def _stop_ids(fields: dict[str, Any]) -> tuple[int, ...] | None:
    if "stop_ids" not in fields:
        return () if _flag(fields, "ignore_eos") else None
    _flag(fields, "ignore_eos")  # what is given stands in the place of the model's own
    given = fields["stop_ids"]
    if not isinstance(given, list) or len(given) > _MOST_STOPS:
        raise InvalidRequest(f"stop_ids is {_show(given)}; it takes up to 1,024 token ids")
    return tuple(_whole(one, "an id of stop_ids", 0, 2**32 - 1) for one in given)


def _salt(fields: dict[str, Any]) -> str | None:
    if "salt" not in fields:
        return None
    salt = _text(fields["salt"], "salt", _LONGEST_ID)
    check_text(salt, "salt")
    return salt


def _generated(fields: dict[str, Any]) -> tuple[int, ...]:
    given = fields.get("generated", [])
    if not isinstance(given, list):
        raise InvalidRequest(f"generated is {_show(given)}; it takes token ids")
    return tuple(_whole(one, "an id of generated", 0, 2**32 - 1) for one in given)


def _logit_bias(given: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(given, dict) or len(given) > _MOST_BIASED:
        raise InvalidRequest(
            f"logit_bias is {_show(given)}; it takes an object of up to 1,024 token ids"
        )
    found: dict[int, float] = {}
    for name, bias in given.items():
        if not _TOKEN.fullmatch(name):
            raise InvalidRequest(f"logit_bias names {_show(name)}; it takes token ids")
        found[int(name)] = _number({"logit_bias": bias}, "logit_bias", 0.0, -100.0, 100.0)
    return tuple(found.items())


def _logprobs(fields: dict[str, Any]) -> int | None:
    num_top = _whole(fields.get("top_logprobs", 0), "top_logprobs", 0, MOST_LOGPROBS)
    if _flag(fields, "logprobs"):
        return num_top
    if num_top:
        raise InvalidRequest(f"top_logprobs is {num_top}; it goes with logprobs, which is not set")
    return None


def _prompt_logprobs(fields: dict[str, Any]) -> int | None:
    if "prompt_logprobs" not in fields:
        return None
    return _whole(fields["prompt_logprobs"], "prompt_logprobs", 0, MOST_LOGPROBS)


def _beams(fields: dict[str, Any]) -> BeamSearch | None:
    if "beams" not in fields:
        if beside := [name for name in ("length_penalty", "early_stopping") if name in fields]:
            raise InvalidRequest(f"{beside[0]} goes with beams, which are not asked for")
        return None
    early = fields.get("early_stopping", False)
    if early != "never":
        early = _flag(fields, "early_stopping")
    most = MOST_LENGTH_PENALTY
    return BeamSearch(
        _whole(fields["beams"], "beams", 1, MOST_BEAMS),
        _number(fields, "length_penalty", 1.0, -most, most),
        early,
    )


def _list(stops: Any) -> list[Any]:
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
        raise InvalidRequest(f"stop is {_show(stops)}; it takes a text or up to 1,024 of them")
    return stops


def _text(value: Any, name: str, longest: int) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} holds {_show(value)}; it takes texts")
    if len(value) > longest:
        raise InvalidRequest(f"{name} has {len(value):,} characters; at most {longest:,}")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise InvalidRequest(f"{name} holds half a character (U+D800 to U+DFFF): that is no text")
    return value


def _whole(value: Any, name: str, least: int, most: int) -> int:
    if type(value) is not int:
        raise InvalidRequest(f"{name} is {_show(value)}; it takes a whole number")
    if not least <= value <= most:
        raise InvalidRequest(f"{name} is {_show(value)}; it takes one from {least} to {most}")
    return value


def _number(
    fields: dict[str, Any], name: str, default: float, least: float = 0.0, most: float = math.inf
) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} is {_show(value)}; it takes a number")
    if not least <= value <= min(most, 1e300) or not math.isfinite(value):
        bound = f" to {most:g}" if math.isfinite(most) else " on"
        raise InvalidRequest(f"{name} is {_show(value)}; it takes a number from {least:g}{bound}")
    return float(value)


def _flag(fields: dict[str, Any], name: str, *, default: bool = False) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {_show(value)}; it takes true or false")
    return value


def _show(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return f"a number of {value.bit_length()} bits"
    text = "true" if value is True else "false" if value is False else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
