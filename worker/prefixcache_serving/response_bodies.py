"""The answer of `/v1/responses`, whole or as the events of a stream.

```
response.created  response.in_progress            nothing is in it yet; sent with the first token
response.output_item.added                        a message
  response.content_part.added                     its text
    response.output_text.delta ...                the text, piece by piece
    response.output_text.done                     all of it
  response.content_part.done
response.output_item.done
response.output_item.added                        a call of a tool, if any
  response.function_call_arguments.delta ...      its arguments, piece by piece
  response.function_call_arguments.done
response.output_item.done
response.completed | .incomplete | .failed        the whole answer, with its usage
```
An answer that only calls has no message.  No `[DONE]` is behind it.  The first events travel with
the first token: whoever measures the first one measures the first token.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from prefixcache_serving.ask import Ask
from prefixcache_serving.bodies import (
    Piece,
    TokenLogprob,
    approximated,
    call_id,
    explained,
    told_token,
)
from prefixcache_serving.call_form import CallPiece
from prefixcache_serving.journey import Journey
from prefixcache_serving.meter import cached_of
from prefixcache_serving.refusals import Refused
from prefixcache_serving.served_model import ServedModel

IN_PROGRESS, COMPLETED, INCOMPLETE, FAILED = "in_progress", "completed", "incomplete", "failed"


@dataclass(slots=True)
class _Item:
    """A part of an answer: a message, or a call of a tool."""

    id: str
    index: int
    call_id: str = ""
    """Of a call; empty: it is a message."""
    name: str = ""
    text: str = ""
    """Of the message, or the call's arguments."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    status: str = IN_PROGRESS


@dataclass
class ResponseBodies:
    """The bodies of one request; it has one answer.

    Args:
        ask: what was asked.
        model: of whom.
        explains: tell the fate of the prompt's tokens, and who computed.
    """

    ends_with_done: ClassVar[bool] = False

    ask: Ask
    model: ServedModel
    explains: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    num_tokens: int = 0
    reason: str | None = None
    _items: list[_Item] = field(default_factory=list)
    _untold: list[TokenLogprob] = field(default_factory=list)
    """Of tokens that have given no text yet."""
    _fresh: list[dict[str, Any]] = field(default_factory=list)
    _num_told: int = 0
    """Events."""

    def __post_init__(self) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"

    def take(self, piece: Piece) -> None:
        """Note what is told."""
        self.num_tokens += piece.num_tokens
        self.reason = piece.reason
        self._fresh = list(self._happens(piece))

    def whole(self, journeys: Sequence[Journey]) -> dict[str, Any]:
        """Give the answer that is not streamed."""
        return self._response(self._status(), journeys)

    def events(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Give the events of what was taken last."""
        yield from self._fresh

    def last(self, journeys: Sequence[Journey]) -> Iterator[dict[str, Any]]:
        """Give the event that ends the stream."""
        yield self._event(f"response.{self._status()}", {"response": self.whole(journeys)})

    def failure(self, refusal: Refused) -> Iterator[dict[str, Any]]:
        """Give the event that ends a stream which cannot go on."""
        code = "rate_limit_exceeded" if refusal.status == 429 else "server_error"
        if self._items and self._items[-1].status == IN_PROGRESS:
            self._items[-1].status = INCOMPLETE
        error = {"error": {"code": code, "message": str(refusal)}}
        yield self._event("response.failed", {"response": self._response(FAILED) | error})

    # -------------------------------------------------------------------------------- what happens

    def _happens(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if not self._num_told:
            for kind in ("created", "in_progress"):
                yield self._event(f"response.{kind}", {"response": self._response(IN_PROGRESS)})
        self._untold += piece.logprobs
        if piece.calls:
            self._untold.clear()  # calls have none
        is_last = bool(piece.reason)
        if piece.text or (is_last and not self._items) or (is_last and self._untold):
            yield from self._say(piece.text)
        for call in piece.calls:
            yield from self._call(call)
        if is_last:
            yield from self._close()

    def _say(self, text: str) -> Iterator[dict[str, Any]]:
        """Add to the message, or begin one."""
        if not self._items or self._items[-1].call_id:
            yield from self._close()
            item = self._begin("msg")
            yield self._event(
                "response.output_item.added",
                {"output_index": item.index, "item": self._shown(item) | {"content": []}},
            )
            empty = {"part": self._part(item)}
            yield self._event("response.content_part.added", _place(item) | empty)
        item = self._items[-1]
        item.text += text
        item.logprobs += self._untold
        if text or self._untold:
            told = {"delta": text, "logprobs": self._logprobs(self._untold)}
            yield self._event("response.output_text.delta", _place(item) | told)
        self._untold = []

    def _call(self, piece: CallPiece) -> Iterator[dict[str, Any]]:
        """Add to a call, or begin one."""
        if piece.name is not None:
            yield from self._close()
            item = self._begin("fc", call_id(self.ask.calls), piece.name)
            yield self._event(
                "response.output_item.added",
                {"output_index": item.index, "item": self._shown(item)},
            )
        item = self._items[-1]
        item.text += piece.arguments
        if piece.arguments:
            told = {"item_id": item.id, "output_index": item.index, "delta": piece.arguments}
            yield self._event("response.function_call_arguments.delta", told)

    def _begin(self, prefix: str, call: str = "", name: str = "") -> _Item:
        item = _Item(f"{prefix}_{uuid.uuid4().hex}", len(self._items), call, name)
        self._items.append(item)
        return item

    def _close(self) -> Iterator[dict[str, Any]]:
        """End the last item, if it is not at its end."""
        if not self._items or self._items[-1].status != IN_PROGRESS:
            return
        item = self._items[-1]
        item.status = self._status()
        if item.call_id:
            told = {"item_id": item.id, "output_index": item.index, "name": item.name}
            done = told | {"arguments": item.text}
            yield self._event("response.function_call_arguments.done", done)
        else:
            told = {"text": item.text, "logprobs": self._logprobs(item.logprobs)}
            yield self._event("response.output_text.done", _place(item) | told)
            part = {"part": self._part(item)}
            yield self._event("response.content_part.done", _place(item) | part)
        yield self._event(
            "response.output_item.done", {"output_index": item.index, "item": self._shown(item)}
        )

    # ---------------------------------------------------------------------------- how it is written

    def _event(self, kind: str, told: dict[str, Any]) -> dict[str, Any]:
        number = self._num_told
        self._num_told += 1
        return {"type": kind, "sequence_number": number, **told}

    def _status(self) -> str:
        return INCOMPLETE if self.reason == "length" else COMPLETED

    def _shown(self, item: _Item) -> dict[str, Any]:
        if item.call_id:
            return {
                "id": item.id,
                "type": "function_call",
                "status": item.status,
                "call_id": item.call_id,
                "name": item.name,
                "arguments": item.text,
            }
        return {
            "id": item.id,
            "type": "message",
            "role": "assistant",
            "status": item.status,
            "content": [self._part(item)],
        }

    def _part(self, item: _Item) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": item.text,
            "annotations": [],
            "logprobs": self._logprobs(item.logprobs),
        }

    def _response(self, status: str, journeys: Sequence[Journey] = ()) -> dict[str, Any]:
        """Give the answer as far as it is; its usage is told with its end."""
        asked = self.ask.told_again
        told: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.get("instructions"),
            "max_output_tokens": asked.get("max_output_tokens"),
            "metadata": asked.get("metadata", {}),
            "model": self.model.name,
            "output": [self._shown(item) for item in self._items],
            "parallel_tool_calls": asked.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": asked.get("temperature", 1.0),
            "text": {"format": {"type": "text"}} | asked.get("text", {}),
            "tool_choice": asked.get("tool_choice", "auto"),
            "tools": [
                {"parameters": None, "strict": False} | one for one in asked.get("tools", ())
            ],
            "top_logprobs": asked.get("top_logprobs", 0),
            "top_p": asked.get("top_p", 1.0),
            "truncation": "disabled",
        }
        if status == INCOMPLETE:
            told["incomplete_details"] = {"reason": "max_output_tokens"}
        if status == COMPLETED:
            told["completed_at"] = int(time.time())
        if journeys:
            told["usage"] = self._usage(journeys[0])
            if self.explains:
                told |= explained(journeys)
        return told

    def _usage(self, journey: Journey) -> dict[str, Any]:
        num_input = len(self.ask.prompts[0])
        cached = 0 if journey.ledger is None else cached_of(journey.ledger)
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": cached} | approximated(self.ask, [journey]),
            "output_tokens": self.num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_input + self.num_tokens,
        } | ({"approximate": journey.is_approximate} if self.ask.segments else {})

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        return [
            self._entry(one.token, one.logprob)
            | {"top_logprobs": [self._entry(int(token), value) for token, value in one.top or ()]}
            for one in tokens
        ]

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        told = told_token(self.model, token, logprob)
        return told | {"bytes": told["bytes"] or []}  # a list in any case, by OpenAI's schema


def _place(item: _Item) -> dict[str, Any]:
    return {"item_id": item.id, "output_index": item.index, "content_index": 0}
