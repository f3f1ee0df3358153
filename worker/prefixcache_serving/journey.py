"""One answer on its way, over as many workers as it takes.

```
             worker 1, attempt 0          worker 2, attempt 1
prompt ──►   t0 t1 t2  ╳ killed    ──►    (prompt, t0 t1 t2) t3 t4 ... ──► reason
read         ──────────────────────────────────────► by one consumer, at its own pace
```
Who goes on is told what was generated; what is cached of that is not computed again.  A worker's
events name the attempt, so that what an old one still says is nobody's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from prefixcache.types import Ledger
from prefixcache_serving.refusals import Refused

BEHIND: Final = 256
"""Tokens that a reader may be behind; then the answer is set down until it has read half of them,
and holds nothing meanwhile."""


@dataclass(eq=False)
class Journey:
    """An answer.

    Args:
        id: unique in the front.
        line: what a worker is sent, but for the id and what was generated.
        stop_ids: tokens that end it.
        tenant: whose it is.
    """

    id: str
    line: Mapping[str, Any]
    stop_ids: frozenset[int]
    tenant: str = ""
    tokens: list[int] = field(default_factory=list)
    """Generated so far, on whichever worker."""
    logprobs: list[tuple[float, list[list[float]]]] = field(default_factory=list)
    """Of each token, where they were asked for: its own, and the most likely ones' with theirs."""
    scores: list[tuple[float, list[list[float]]]] = field(default_factory=list)
    """Likewise of the prompt's tokens from the second one on."""
    beams: list[Mapping[str, Any]] = field(default_factory=list)
    """The likeliest answers, best first, where they were searched."""
    attempt: int = 0
    num_deaths: int = 0
    """Workers that ended by themselves with it in hand."""
    num_hangs: int = 0
    """Workers that made no step any more with it in hand, since its last token."""
    due: int = 0
    """Tokens that still have to run through the model before the next one comes."""
    ledger: Ledger | None = None
    """Of the prompt, as the first worker that had blocks for it told."""
    is_approximate: bool = False
    """Whether a worker has computed it over segments."""
    is_hurried: bool = False
    """Whether the next worker is not to wait for a prefix that another one is computing: that one
    may be whom it was taken from, which still holds its lease, of little more than is cached."""
    left_out: tuple[str, ...] = ()
    """What of the request has no effect, as a worker told."""
    is_set_down: bool = False
    num_pauses: int = 0
    """Times in a row that its tenant's quota had no room for it."""
    short_s: float = 0.0
    """Since when."""
    worker: str = ""
    """Who has it now; empty: nobody."""
    workers: list[str] = field(default_factory=list)
    """All who had it, in their order."""
    _reason: str = ""
    _failure: Refused | None = None
    _num_read: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.due = self.num_context
        if reason := self.ended_by():
            self.finish(reason)

    @property
    def name(self) -> str:
        """What the worker that has it now calls it."""
        return f"{self.id}.{self.attempt}"

    @property
    def num_context(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.line["tokens"]) + len(self.tokens)

    @property
    def is_scoring(self) -> bool:
        """Whether log-probabilities of the prompt are still to come."""
        wanted = "prompt_logprobs" in self.line
        return wanted and len(self.scores) < len(self.line["tokens"]) - 1

    @property
    def num_lanes(self) -> int:
        """Sequences that it is in a worker."""
        return int(self.line.get("beams", 1))

    @property
    def num_unread(self) -> int:
        """Tokens that the reader has not taken."""
        return len(self.tokens) - self._num_read

    @property
    def is_over(self) -> bool:
        """Whether nothing will be added any more."""
        return bool(self._reason) or self._failure is not None

    def next_line(self) -> dict[str, Any]:
        """Give what the next worker is sent."""
        line = {"id": self.name, **self.line, "waits_for_quota": False}
        if self.tokens:
            line["generated"] = list(self.tokens)
        if self.is_hurried:
            line["wait_s"] = 0
        if self.scores and not self.is_scoring:
            del line["prompt_logprobs"]  # so that the prompt is not computed again
        return line

    def add(self, event: Mapping[str, Any]) -> None:
        """Take the next token, as a worker told it."""
        self.tokens.append(int(event["token"]))
        if "logprob" in event:
            self.logprobs.append((event["logprob"], event.get("top_logprobs", [])))
        self.due = 1
        self.num_hangs = 0
        self._changed.set()

    def add_scores(self, event: Mapping[str, Any]) -> None:
        """Take log-probabilities of the prompt; who goes on tells all of them again."""
        known = len(self.scores) + 1 - int(event["start"])
        told = zip(event["logprobs"][known:], event["top_logprobs"][known:], strict=True)
        self.scores.extend(told)
        self._changed.set()

    def ended_by(self) -> str:
        """Say why it is at its end, although no worker has said so; empty: it is not."""
        if self.tokens and self.tokens[-1] in self.stop_ids:
            return "stop"
        is_whole = len(self.tokens) >= self.line["max_new_tokens"] and not self.is_scoring
        return "length" if is_whole else ""

    def finish(self, reason: str) -> None:
        """End it: `stop` or `length`."""
        self._reason = self._reason or reason
        self._changed.set()

    def fail(self, refusal: Refused) -> None:
        """End it without an answer."""
        self._failure = self._failure or refusal
        self._changed.set()

    async def read_scores(self) -> None:
        """Wait until the log-probabilities of the prompt are there.  From any task.

        Raises:
            Refused: it failed.
        """
        while self.is_scoring and not self.is_over:
            self._changed.clear()
            await self._changed.wait()
        if self.is_scoring:
            raise self._failure or Refused("given up", status=503)

    async def read(self) -> tuple[list[int], str]:
        """Wait for more; give the tokens since the last call, and why there will be no more.

        Raises:
            Refused: it failed; what came before was given.
        """
        while not (self.num_unread or self.is_over):
            self._changed.clear()
            await self._changed.wait()
        fresh = self.tokens[self._num_read :]
        if not fresh and self._failure is not None:
            raise self._failure
        self._num_read = len(self.tokens)
        return fresh, self._reason
