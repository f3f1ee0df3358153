"""The answer of `/v1/responses`, whole or as the events of a stream.

```
response.created  response.in_progress            nothing is in it yet; sent with the first token
response.output_item.added                        a message
  response.content_part.added                     its text
    response.output_text.delta ...                the text, piece by piece
    response.output_text.done                     all of it
  response.content_part.done
response.output_item.done
response.completed | .incomplete | .failed        the whole answer, with its usage
```
No `[DONE]` is behind it.  The first events travel with the first token: whoever measures the first
one measures the first token.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from prefixcache_serving.ask import Ask
from prefixcache_serving.bodies import Piece, TokenLogprob, explained, told_token
from prefixcache_serving.journey import Journey
from prefixcache_serving.meter import cached_of
from prefixcache_serving.refusals import Refused
from prefixcache_serving.served_model import ServedModel

IN_PROGRESS, COMPLETED, INCOMPLETE, FAILED = "in_progress", "completed", "incomplete", "failed"


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
    text: str = ""
    num_tokens: int = 0
    reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    _item: str = ""
    _num_told: int = 0
    """Events."""

    def __post_init__(self) -> None:
        mark = uuid.uuid4().hex
        self.id, self._item = f"resp_{mark}", f"msg_{mark}"

    def take(self, piece: Piece) -> None:
        """Note what is told."""
        self.text += piece.text
        self.num_tokens += piece.num_tokens
        self.reason = piece.reason
        self.logprobs += piece.logprobs

    def whole(self, journeys: Sequence[Journey]) -> dict[str, Any]:
        """Give the answer that is not streamed."""
        return self._response(self._status(), [self._message(self._status())], journeys)

    def events(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Give the events of what was taken last."""
        if not self._num_told:
            yield from self._first()
        if piece.text or piece.logprobs:
            told = {"delta": piece.text, "logprobs": self._logprobs(piece.logprobs)}
            yield self._event("response.output_text.delta", self._place | told)
        if piece.reason:
            told = {"text": self.text, "logprobs": self._logprobs(self.logprobs)}
            yield self._event("response.output_text.done", self._place | told)
            part = {"part": self._part()}
            yield self._event("response.content_part.done", self._place | part)
            item = {"output_index": 0, "item": self._message(self._status())}
            yield self._event("response.output_item.done", item)

    def last(self, journeys: Sequence[Journey]) -> Iterator[dict[str, Any]]:
        """Give the event that ends the stream."""
        yield self._event(f"response.{self._status()}", {"response": self.whole(journeys)})

    def failure(self, refusal: Refused) -> Iterator[dict[str, Any]]:
        """Give the event that ends a stream which cannot go on."""
        code = "rate_limit_exceeded" if refusal.status == 429 else "server_error"
        output = [self._message(INCOMPLETE)]
        response = self._response(FAILED, output) | {
            "error": {"code": code, "message": str(refusal)}
        }
        yield self._event("response.failed", {"response": response})

    def _first(self) -> Iterator[dict[str, Any]]:
        for kind in ("created", "in_progress"):
            begun = {"response": self._response(IN_PROGRESS, [])}
            yield self._event(f"response.{kind}", begun)
        message = self._message(IN_PROGRESS) | {"content": []}
        yield self._event("response.output_item.added", {"output_index": 0, "item": message})
        empty = {"part": self._part() | {"text": "", "logprobs": []}}
        yield self._event("response.content_part.added", self._place | empty)

    def _event(self, kind: str, told: dict[str, Any]) -> dict[str, Any]:
        number = self._num_told
        self._num_told += 1
        return {"type": kind, "sequence_number": number, **told}

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _status(self) -> str:
        return INCOMPLETE if self.reason == "length" else COMPLETED

    def _message(self, status: str) -> dict[str, Any]:
        return {
            "id": self._item,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part()],
        }

    def _part(self) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": self.text,
            "annotations": [],
            "logprobs": self._logprobs(self.logprobs),
        }

    def _response(
        self, status: str, output: list[dict[str, Any]], journeys: Sequence[Journey] = ()
    ) -> dict[str, Any]:
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
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": asked.get("temperature", 1.0),
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
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
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": self.num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_input + self.num_tokens,
        }

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        return [
            self._entry(one.token, one.logprob)
            | {"top_logprobs": [self._entry(int(token), value) for token, value in one.top or ()]}
            for one in tokens
        ]

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        told = told_token(self.model, token, logprob)
        return told | {"bytes": told["bytes"] or []}  # a list in any case, by OpenAI's schema
