"""The act before the last: an answer that goes on although its worker is killed in mid-sentence.

```
w1  prompt ──► "The best way to clean a chain ╳ SIGKILL
w2             prompt, what was said ──────────► is to use a degreaser and ..."
```
Who goes on is given what was said.  Keys and values of it lie in the pool; what does not is
computed again.  `prefixcache up` does this for every answer.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from prefixcache_worker.demo.compare import Difference, first_difference
from prefixcache_worker.demo.dispatcher import Dispatcher, read_top
from prefixcache_worker.demo.failure import RequestFailed
from prefixcache_worker.demo.record import Request, TopTwo
from prefixcache_worker.demo.view import View, opening

QUESTION: Final = "Please sum up in a few sentences what I should do now, and why."
TOKENS: Final = 48
"""How long the sentence may become."""
_ID: Final = "sentence"
_MOMENT_S: Final = 120.0
"""How long to wait for a token."""


class Mortal(Protocol):
    """The part of a worker process that this needs."""

    name: str

    @property
    def pid(self) -> int:
        """Its process id."""

    def kill(self) -> None:
        """Send SIGKILL."""

    def send(self, line: dict[str, Any]) -> None:
        """Hand over one line."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """What became of it."""

    worker: str
    pid: int
    heir: str
    num_prompt: int
    num_before: int
    """Tokens that were said before the kill."""
    num_tokens: int
    num_again: int
    """Tokens that had to be computed before it went on; one of them in any case."""
    block_size: int
    gap_ms: float
    """From the last token before to the first one after."""
    step_ms: float
    """From token to token, median of those before."""
    text: str
    difference: Difference | None
    """From what the model says without a cache and without a kill."""
    of_bits: bool
    """Whether logits were compared bit for bit, and not tokens alone."""

    @property
    def survived(self) -> bool:
        """Whether it went on, the same, and almost nothing was computed again."""
        is_same = self.difference is None or self.difference.tie
        return is_same and self.num_again <= self.block_size + 1

    def told(self) -> str:
        """Say it in a line."""
        context = self.num_prompt + self.num_before
        if self.difference is None:
            what = "to the last bit" if self.of_bits else "token for token"
            end = f"the same {self.num_tokens} tokens as without a cache, {what}"
        else:
            end = str(self.difference)
        return (
            f"{self.worker} (pid {self.pid}) was killed with SIGKILL in mid-sentence; {self.heir} "
            f"went on after {self.gap_ms:.0f} ms: {context:,} tokens of context, {self.num_again} "
            f"computed again, {end}."
        )


async def outlive(
    dispatcher: Dispatcher,
    victim: Mortal,
    heir: Mortal,
    prompt: Sequence[int],
    expected: Request,
    block_size: int,
    view: View,
) -> Sentence:
    """Let `victim` answer, kill it in the middle, and let `heir` go on.

    Args:
        dispatcher: hears the workers.
        victim: dies.
        heir: goes on.
        prompt: what is asked.
        expected: the same, answered without a cache.
        block_size: tokens of a block.
        view: shows it.

    Raises:
        RequestFailed: one of them refused, or said nothing for minutes.
    """
    heard: asyncio.Queue[tuple[str, Mapping[str, Any], float]] = asyncio.Queue()
    dispatcher.overhear = lambda worker, event, now: heard.put_nowait((worker, event, now))
    of_bits = dispatcher.log_logits
    line = {"tokens": list(prompt), "max_new_tokens": TOKENS, "temperature": 0.0, "wait_s": 30.0}
    line["log_logits"] = of_bits
    middle = max(1, len(expected.answer) // 2)
    tokens: list[int] = []
    times: list[float] = []
    texts: list[str] = []
    tops: list[TopTwo] = []
    victim.send({"id": _ID, **line})
    while len(tokens) < middle:
        event, now = await _next(heard, victim)
        if event["event"] == "token":
            tokens.append(int(event["token"]))
            times.append(now)
            texts.append(str(event["text"]))
            tops += [read_top(event["top"])] if of_bits else []
    victim.kill()
    view.say(f"{victim.name}: {opening(''.join(texts), 100)}")
    view.say(f"{victim.name} (pid {victim.pid}) is killed with SIGKILL in the middle of that.")
    dispatcher.worker_died(victim.name, dispatcher.clock())
    heir.send({"id": _ID, **line, "generated": list(tokens)})
    num_again, first_s = 0, 0.0
    while True:
        event, now = await _next(heard, heir)
        if event["event"] == "started":
            num_again = int(event["num_to_compute"])
        elif event["event"] == "token":
            tokens.append(int(event["token"]))
            texts.append(str(event["text"]))
            tops += [read_top(event["top"])] if of_bits else []
            first_s = first_s or now
        elif event["event"] == "finished":
            break
    view.say(f"{heir.name}: … {opening(''.join(texts[middle:]), 100)}")
    steps = sorted(b - a for a, b in itertools.pairwise(times))
    sentence = Sentence(
        worker=victim.name,
        pid=victim.pid,
        heir=heir.name,
        num_prompt=len(prompt),
        num_before=middle,
        num_tokens=len(tokens),
        num_again=num_again,
        block_size=block_size,
        gap_ms=round((first_s - times[-1]) * 1e3, 1),
        step_ms=round(steps[len(steps) // 2] * 1e3, 1) if steps else 0.0,
        text="".join(texts),
        difference=first_difference(
            _ID, tokens, expected.answer, expected.logits, bits=tops if of_bits else None
        ),
        of_bits=of_bits,
    )
    view.say(sentence.told())
    return sentence


async def _next(
    heard: asyncio.Queue[tuple[str, Mapping[str, Any], float]], worker: Mortal
) -> tuple[Mapping[str, Any], float]:
    """Wait for what a worker says of the sentence; what another one still says is nobody's."""
    while True:
        try:
            name, event, now = await asyncio.wait_for(heard.get(), _MOMENT_S)
        except TimeoutError:
            raise RequestFailed(f"{worker.name} said nothing of the sentence") from None
        if name != worker.name or event.get("id") != _ID:
            continue
        if event["event"] == "failed":
            raise RequestFailed(f"the sentence on {worker.name}: {event}")
        return event, now
