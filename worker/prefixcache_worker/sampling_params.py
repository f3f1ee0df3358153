"""How answers are asked of `LLM`, by the names that vLLM's users know.  No torch.

A field that has no effect here takes its default only, and says why when it is given another value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache.plain_json import once_each
from prefixcache_worker.grammar import Grammar, read_grammar

_NOT_HERE: Final[dict[str, tuple[Any, str]]] = {
    "flat_logprobs": (False, "log-probabilities come as a dict for each token"),
    "detokenize": (True, "answers have their text"),
    "skip_special_tokens": (True, "special tokens are in token_ids, not in the text"),
    "spaces_between_special_tokens": (True, "special tokens are not in the text"),
    "include_stop_str_in_output": (False, "what ends an answer is not in its text"),
    "allowed_token_ids": (None, "give logit_bias"),
    "bad_words": (None, "give logit_bias"),
    "output_kind": (None, "answers are given when they are whole"),
    "extra_args": (None, "there are none"),
    "best_of": (None, "ask for n, and choose by cumulative_logprob"),
    "watermarking": (None, "no answer is marked"),
    "logprob_token_ids": (None, "ask for logprobs, up to 20"),
    "prompt_logprob_token_ids": (None, "ask for prompt_logprobs, up to 20"),
    "prompt_logprob_start": (None, "prompt_logprobs are of the whole prompt"),
    "stream_interval": (None, "answers are given when they are whole"),
    "skip_clone": (False, "nothing is cloned"),
    "skip_reading_prefix_cache": (None, "give the prompt a cache_salt of its own"),
    "thinking_token_budget": (None, "give max_tokens"),
    "repetition_detection": (None, "give repetition_penalty or frequency_penalty"),
    "routed_experts_prompt_start": (0, "experts are not told"),
    "trace_decode_token_ids": (None, "nothing is traced"),
}
_NOT_OF_BEAMS: Final[dict[str, tuple[Any, str]]] = {
    "include_stop_str_in_output": (False, "no text ends a search"),
    "structured_outputs": (None, "beams are not held to a grammar"),
    "skip_special_tokens": (True, "special tokens are in tokens, not in the text"),
    "watermarking": (None, "no answer is marked"),
}
_NOT_HELD: Final[dict[str, tuple[Any, str]]] = {
    "regex": (None, "give json, choice or json_object"),
    "grammar": (None, "give json, choice or json_object"),
    "structural_tag": (None, "give json, choice or json_object"),
    "disable_any_whitespace": (False, "JSON is written as Python's json does"),
    "disable_additional_properties": (False, 'say "additionalProperties": false in the schema'),
    "whitespace_pattern": (None, "JSON is written as Python's json does"),
}


def _refuse(params: object, fields: Mapping[str, tuple[Any, str]]) -> None:
    for name, (default, why) in fields.items():
        if getattr(params, name) != default:
            raise Unsupported(f"{name} has no effect here: {why}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What an answer must look like: one of `json`, `choice` and `json_object`.

    Raises:
        InvalidRequest: not one of them, or it is none of its kind, or beyond a bound.
        Unsupported: as `SamplingParams`; what of a schema is not enforced is refused by `generate`.

    >>> StructuredOutputsParams(choice=["yes", "no"]).made.choices
    ('yes', 'no')
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, or its text."""
    regex: str | None = None
    choice: Sequence[str] | None = None
    """Texts of which the answer is one."""
    grammar: str | None = None
    json_object: bool | None = None
    """True: any JSON object."""
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None
    made: Grammar = field(init=False, repr=False, compare=False)
    """The same, as a request has it."""

    def __post_init__(self) -> None:
        _refuse(self, _NOT_HELD)
        given = {"json": self.json, "choice": self.choice, "json_object": self.json_object or None}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            told = ", ".join(names) or "none"
            raise InvalidRequest(
                f"structured_outputs takes one of json, choice, json_object: {told}"
            )
        object.__setattr__(self, "made", read_grammar(self._grammar()))

    def _grammar(self) -> dict[str, Any]:
        if self.json_object:
            return {"schema": {"type": "object"}}
        if self.choice is not None:
            if isinstance(self.choice, str):
                raise InvalidRequest("structured_outputs: choice is a text; it takes several")
            return {"choices": list(self.choice)}
        schema = self.json
        if isinstance(schema, str):
            try:
                schema = json.loads(schema, object_pairs_hook=once_each)
            except (ValueError, RecursionError) as fault:
                raise InvalidRequest(f"structured_outputs: json is none: {fault}") from None
        return {"schema": dict(schema) if isinstance(schema, Mapping) else schema}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of answers are chosen, and when they end.

    Raises:
        Unsupported: a field of vLLM's that has no effect here has another value than its default.

    >>> SamplingParams(temperature=0).max_tokens
    16
    """

    n: int = 1
    """Answers to each prompt; the prompt is computed once."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 and -1 are all."""
    min_p: float = 0.0
    seed: int | None = None
    """The same seed, the same answers, in any process."""
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    """Beside the model's own."""
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: as much as the model takes."""
    min_tokens: int = 0
    logprobs: int | None = None
    """Tell each token's log-probability, and those of so many of the most likely ones, up to 20."""
    prompt_logprobs: int | None = None
    """The same of the prompt, all of which is computed for that, whatever is cached."""
    logit_bias: Mapping[int, float] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    """What the answer must look like."""
    segments: bool = False
    """Use what of the prompt is stored at other places, too, approximately (not of vLLM)."""
    output_kind: Any = None
    extra_args: Mapping[str, Any] | None = None
    best_of: int | None = None
    watermarking: bool | None = None
    logprob_token_ids: Sequence[int] | None = None
    prompt_logprob_token_ids: Any = None
    prompt_logprob_start: int | None = None
    stream_interval: int | None = None
    skip_clone: bool = False
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    repetition_detection: Any = None
    routed_experts_prompt_start: int = 0
    trace_decode_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _refuse(self, _NOT_HERE)
        held = self.structured_outputs
        if not (held is None or isinstance(held, StructuredOutputsParams)):
            kind = type(held).__name__
            raise InvalidRequest(
                f"structured_outputs is of type {kind}; it takes StructuredOutputsParams"
            )
        if not isinstance(self.segments, bool):
            raise InvalidRequest(f"segments is {self.segments!r}; it takes True or False")
        if self.segments and self.prompt_logprobs is not None:
            raise InvalidRequest(
                "segments do not go with prompt_logprobs, for which all of the prompt is computed"
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """How the likeliest answers are searched.

    Raises:
        Unsupported: as `SamplingParams`.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    """By the length of the answer."""
    early_stopping: bool | Literal["never"] = False
    include_stop_str_in_output: bool = False
    structured_outputs: Any = None
    skip_special_tokens: bool = True
    watermarking: bool | None = None

    def __post_init__(self) -> None:
        _refuse(self, _NOT_OF_BEAMS)
        if self.temperature not in (0.0, 1.0):
            raise Unsupported("temperature has no effect on beam_search: the model's own is taken")
