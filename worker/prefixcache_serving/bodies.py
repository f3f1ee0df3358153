"""Answers and chunks as OpenAI's clients read them.

```
chat          {"object": "chat.completion", "choices": [{"message": ...}], "usage": ...}
  stream      {"object": "chat.completion.chunk", "choices": [{"delta": ...}]}
completions   {"object": "text_completion", "choices": [{"text": ...}]}, streamed or not
```
The role travels with the first token: whoever measures the first chunk measures the first token.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from prefixcache_serving.ask import Ask
from prefixcache_serving.call_form import CallForm, CallPiece
from prefixcache_serving.fields import CHAT
from prefixcache_serving.journey import Journey
from prefixcache_serving.meter import cached_of
from prefixcache_serving.refusals import Refused
from prefixcache_serving.served_model import ServedModel

_IMPOSSIBLE: Final = -9999.0


@dataclass(slots=True)
class Choice:
    """One answer as far as it was told."""

    index: int
    text: str = ""
    num_tokens: int = 0
    reason: str | None = None
    has_begun: bool = False
    calls: list[Called] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True)
class Called:
    """A call of a tool, as far as it was told."""

    id: str
    name: str
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability."""

    token: int
    logprob: float | None
    """None: minus infinity, for which JSON has no word."""
    top: list[list[float]] | None
    """Of the most likely tokens: token and log-probability, best first.  None: it is a prompt's
    first token, which nothing comes before, and has no log-probability."""
    offset: int
    """Characters that were told before it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What can be told of an answer now."""

    index: int
    text: str
    num_tokens: int
    reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    calls: tuple[CallPiece, ...] = ()

    @property
    def weight(self) -> int:
        """Tokens and log-probabilities that are in it."""
        most = len(self.logprobs[-1].top or ()) if self.logprobs else 0
        return self.num_tokens + len(self.logprobs) * (1 + most)


@dataclass
class Bodies:
    """The bodies of one request.

    Args:
        ask: what was asked.
        model: of whom.
        explains: tell the fate of each prompt's tokens, and who computed.
    """

    ends_with_done: ClassVar[bool] = True

    ask: Ask
    model: ServedModel
    explains: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    choices: list[Choice] = field(default_factory=list)

    def __post_init__(self) -> None:
        prefix = "chatcmpl" if self.ask.kind == CHAT else "cmpl"
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        count = len(self.ask.prompts) * self.ask.num_choices
        self.choices = [Choice(index) for index in range(count)]

    def take(self, piece: Piece) -> None:
        """Note what is told."""
        choice = self.choices[piece.index]
        choice.text += piece.text
        choice.num_tokens += piece.num_tokens
        choice.reason = piece.reason
        choice.logprobs += piece.logprobs
        for part in piece.calls:
            if part.name is not None:
                choice.calls.append(Called(call_id(self.ask.calls), part.name))
            choice.calls[part.index].arguments += part.arguments

    def whole(self, journeys: Sequence[Journey]) -> dict[str, Any]:
        """Give the answer that is not streamed."""
        is_chat = self.ask.kind == CHAT
        choices = [
            {
                "index": index,
                "logprobs": self._logprobs(one.logprobs),
                "finish_reason": one.reason,
            }
            | ({"message": _message(one)} if is_chat else {"text": one.text})
            for index, one in enumerate(self._best(journeys))
        ]
        kind = "chat.completion" if is_chat else "text_completion"
        told = {"choices": choices, "usage": self.usage(journeys)}
        return self._head(kind) | told | (explained(journeys) if self.explains else {})

    def events(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Give the chunks of what was taken last."""
        yield self.chunk(piece)

    def last(self, journeys: Sequence[Journey]) -> Iterator[dict[str, Any]]:
        """Give what is behind the last chunk with an answer."""
        if self.ask.include_usage:
            yield self.last_chunk(journeys)

    def failure(self, refusal: Refused) -> Iterator[dict[str, Any]]:
        """Give the event that ends a stream which cannot go on."""
        yield refusal.body

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Give a chunk of the stream."""
        choice = self.choices[piece.index]
        told: dict[str, Any]
        if self.ask.kind == CHAT:
            delta: dict[str, Any] = {} if choice.has_begun else {"role": "assistant", "content": ""}
            if piece.text:
                delta["content"] = piece.text
            if piece.calls:
                delta["tool_calls"] = [_call_delta(one, choice) for one in piece.calls]
            told = {"delta": delta}
        else:
            told = {"text": piece.text}
        choice.has_begun = True
        told |= {
            "index": piece.index,
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": piece.reason,
        }
        usage = {"usage": None} if self.ask.include_usage else {}
        return self._head(self._chunk_kind) | {"choices": [told]} | usage

    def last_chunk(self, journeys: Sequence[Journey]) -> dict[str, Any]:
        """Give the chunk that tells the usage."""
        told = {"choices": [], "usage": self.usage(journeys)}
        return self._head(self._chunk_kind) | told | (explained(journeys) if self.explains else {})

    def usage(self, journeys: Sequence[Journey]) -> dict[str, Any]:
        """Count: each prompt once, each answer's tokens, and what of the prompts was cached."""
        made = self.ask.num_tries
        # Of those who began with a prompt together, one has computed what the others have joined.
        cached = 0
        for first in range(0, len(journeys), made):
            ledgers = [one.ledger for one in journeys[first : first + made]]
            cached += min((cached_of(one) for one in ledgers if one is not None), default=0)
        prompt = sum(map(len, self.ask.prompts))
        completion = sum(choice.num_tokens for choice in self.choices)
        firsts = journeys[::made]
        details = {"cached_tokens": cached} | approximated(self.ask, firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": details,
        } | ({"approximate": is_approximate(journeys)} if self.ask.segments else {})

    def _best(self, journeys: Sequence[Journey]) -> list[Choice]:
        """Give the answers that are told: of each prompt's, those that the model finds likeliest.

        By the mean log-probability of their tokens: a long one is not at a disadvantage.
        """
        made, told = self.ask.num_tries, self.ask.num_answers
        if made == told or self.ask.search is not None:
            return self.choices
        best: list[Choice] = []
        for first in range(0, len(self.choices), made):
            tries = self.choices[first : first + made]
            best += sorted(tries, key=lambda one: -_mean(journeys[one.index], one))[:told]
        return best

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.ask.num_logprobs is None:
            return None
        if self.ask.kind == CHAT:
            told = [
                told_token(self.model, one.token, one.logprob)
                | {
                    "top_logprobs": [
                        told_token(self.model, int(token), value) for token, value in one.top or ()
                    ]
                }
                for one in tokens
            ]
            return {"content": told, "refusal": None}
        return {
            "tokens": [self._text(one.token) for one in tokens],
            "token_logprobs": [None if one.top is None else _finite(one.logprob) for one in tokens],
            "top_logprobs": [
                None if one.top is None else self._by_text(one, one.top) for one in tokens
            ],
            "text_offset": [one.offset for one in tokens],
        }

    def _by_text(self, one: TokenLogprob, top: list[list[float]]) -> dict[str, float]:
        """Give the log-probabilities of the most likely tokens and of the one that is there."""
        told = {self._text(one.token): _finite(one.logprob)}
        return told | {self._text(int(token)): _finite(value) for token, value in reversed(top)}

    def _text(self, token: int) -> str:
        return self.model.text_of(token)

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.ask.kind == CHAT else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
        }


def approximated(ask: Ask, firsts: Sequence[Journey]) -> dict[str, int]:
    """Count what of the prompts was taken from segments, where that was asked for.

    Args:
        ask: what was asked.
        firsts: the first answer to each prompt.
    """
    if not ask.segments:
        return {}
    return {"approximate_tokens": sum(one.ledger.approximate for one in firsts if one.ledger)}


def is_approximate(journeys: Sequence[Journey]) -> bool:
    """Whether any of some answers was computed over segments."""
    return any(one.is_approximate for one in journeys)


def explained(journeys: Sequence[Journey]) -> dict[str, Any]:
    """Tell, for each answer, the fate of its prompt's tokens, and who computed."""
    told = [
        {
            "index": index,
            "ledger": None if one.ledger is None else one.ledger._asdict(),
            "workers": one.workers,
        }
        for index, one in enumerate(journeys)
    ]
    return {"prefixcache": told}


def told_token(model: ServedModel, token: int, logprob: float | None) -> dict[str, Any]:
    """Tell a token and its log-probability."""
    text = model.text_of(token)
    # A token may be a part of a character: what its bytes are, its text does not say.
    told = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": _finite(logprob), "bytes": told}


def _mean(journey: Journey, choice: Choice) -> float:
    """Give the mean log-probability of an answer's tokens."""
    told = [_finite(logprob) for logprob, _ in journey.logprobs[: choice.num_tokens]]
    return sum(told) / max(1, len(told))


def call_id(form: CallForm) -> str:
    """Make a name for a call, as the model's template takes it."""
    return uuid.uuid4().hex[:9] if form.short_ids else f"call_{uuid.uuid4().hex[:24]}"


def _message(choice: Choice) -> dict[str, Any]:
    told: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.calls:
        told["content"] = choice.text or None
        told["tool_calls"] = [
            {
                "id": one.id,
                "type": "function",
                "function": {"name": one.name, "arguments": one.arguments},
            }
            for one in choice.calls
        ]
    return told


def _call_delta(piece: CallPiece, choice: Choice) -> dict[str, Any]:
    function = {"arguments": piece.arguments}
    if piece.name is None:
        return {"index": piece.index, "function": function}
    return {
        "index": piece.index,
        "id": choice.calls[piece.index].id,
        "type": "function",
        "function": {"name": piece.name} | function,
    }


def _finite(logprob: float | None) -> float:
    """Write what cannot be as OpenAI does: JSON has no word for minus infinity."""
    return max(_IMPOSSIBLE, logprob) if logprob is not None else _IMPOSSIBLE
