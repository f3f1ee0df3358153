"""The dispatcher: hands requests to workers, hears them, and sends again what died with one.

```
ask(request) ──► least busy worker that did not serve the chat's last turn ──► finished
                       │ killed
                       └──► the same turn, from the start, to another worker
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from prefixcache.types import Ledger
from prefixcache_worker.demo.failure import RequestFailed, WorkerDied
from prefixcache_worker.demo.record import Request, TopTwo


class Recipient(Protocol):
    """The part of a worker process that the dispatcher uses."""

    name: str

    def send(self, request: dict[str, Any]) -> None:
        """Hand over one request; returns at once."""


@dataclass(slots=True)
class Pending:
    """A request that was handed over and is not answered yet."""

    request: Request
    worker: str
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A request whose worker died, as it was at that moment."""

    request: Request
    worker: str
    sent_s: float
    died_s: float
    started: bool
    num_reused: int
    num_answered: int


@dataclass
class Dispatcher:
    """Hands requests to workers and hears their events.

    Attributes:
        workers: by name; one that died is taken off.
        clock: seconds since the run began.
        answer_tokens: how long an answer may become.
        log_logits: ask the workers for the two best logits of each step.
        on_sent, on_finished: told of each request.
        interrupted: requests that died with their worker, in the order of their ends.
        reserved: a worker that gets only what is sent to it by name.
        overhear: told of each event, with its worker and when.
    """

    workers: dict[str, Recipient]
    clock: Callable[[], float]
    answer_tokens: int
    log_logits: bool = False
    wait_s: float = 30.0
    on_sent: Callable[[Request], None] = lambda request: None
    on_finished: Callable[[Request], None] = lambda request: None
    interrupted: list[Interrupted] = field(default_factory=list)
    reserved: str | None = None
    overhear: Callable[[str, Mapping[str, Any], float], None] = lambda worker, event, now: None
    _pending: dict[str, Pending] = field(default_factory=dict)
    _last: dict[str, str] = field(default_factory=dict)
    _turn: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, request: Request, worker: str | None = None) -> Request:
        """Send a request and wait for its answer; if its worker dies, send it again to another.

        Args:
            request: filled with what happens to it.
            worker: where to send it the first time; by default the dispatcher chooses.

        Raises:
            RequestFailed: a worker refused it, or no worker is left.
        """
        while True:
            chosen = worker if worker in self.workers else self._choose(request)
            worker = None
            self._send(request, chosen)
            try:
                await self._pending[request.id].done
            except WorkerDied:
                continue
            finally:
                self._pending.pop(request.id, None)
                self._changed.set()  # only now: who looked since the worker told saw it in hand
            self._last[request.chat] = chosen
            self.on_finished(request)
            return request

    def hear(self, worker: str, event: Mapping[str, Any], now: float) -> None:
        """Take an event that `worker` told at `now`."""
        self.overhear(worker, event, now)
        pending = self._pending.get(str(event.get("id", "")))
        if pending is None or pending.worker != worker or pending.done.done():
            return
        request = pending.request
        match event["event"]:
            case "started":
                # It tells the events of a step together, after the step; it was granted before.
                request.granted_s = min(now, request.sent_s + float(event["waited_ms"]) / 1e3)
                request.ledger = read_ledger(event["ledger"])
            case "token":
                if request.first_s is None:
                    request.first_s = now
                request.answer.append(int(event["token"]))
                if "top" in event:
                    request.logits.append(read_top(event["top"]))
            case "finished":
                request.answer = [int(token) for token in event["tokens"]]
                request.text = str(event["text"])
                # A worker counts all that ran through the model, and it feeds every token of the
                # answer but the last: what remains are tokens of the prompt.
                fed = max(len(request.answer) - 1, 0)
                request.num_computed = int(event["num_computed"]) - fed
                request.kv_read_bytes = int(event["kv_read_bytes"])
                request.kv_alone_bytes = int(event["kv_alone_bytes"])
                request.done_s = now
                pending.done.set_result(None)
            case "failed":
                pending.done.set_exception(RequestFailed(f"{request.id} on {worker}: {event}"))
        self._changed.set()

    def worker_died(self, worker: str, died_s: float) -> None:
        """Take a dead worker off and interrupt its requests, which `ask` sends again."""
        self.workers.pop(worker, None)
        for pending in self._pending.values():
            if pending.worker == worker and not pending.done.done():
                request = pending.request
                self.interrupted.append(
                    Interrupted(
                        request,
                        worker,
                        request.sent_s,
                        died_s,
                        started=request.granted_s is not None,
                        num_reused=request.ledger.reused,
                        num_answered=len(request.answer),
                    )
                )
                pending.done.set_exception(WorkerDied(worker))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until what the workers tell, or the end of a request, makes `condition` true."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def load(self, worker: str) -> int:
        """Count the requests that `worker` has in hand."""
        return sum(pending.worker == worker for pending in self._pending.values())

    def _choose(self, request: Request) -> str:
        if not self.workers:
            raise RequestFailed(f"{request.id}: no worker is left")
        names = [name for name in self.workers if name != self.reserved] or list(self.workers)
        self._turn += 1
        # Chats move: the worker of the chat's last turn is taken only if all others are busier.
        return min(
            (names[(self._turn + i) % len(names)] for i in range(len(names))),
            key=lambda name: (self.load(name), name == self._last.get(request.chat)),
        )

    def _send(self, request: Request, worker: str) -> None:
        request.worker = worker
        request.sent_s = self.clock()
        request.granted_s = request.first_s = request.done_s = None
        request.ledger = Ledger()
        request.answer, request.logits = [], []
        self._pending[request.id] = Pending(
            request, worker, asyncio.get_running_loop().create_future()
        )
        self.workers[worker].send(
            {
                "id": request.id,
                "tokens": list(request.prompt),
                "max_new_tokens": self.answer_tokens,
                "temperature": 0.0,
                "wait_s": self.wait_s,
                "log_logits": self.log_logits,
            }
        )
        self.on_sent(request)


def read_ledger(stated: Mapping[str, int]) -> Ledger:
    """Read a ledger from an event."""
    return Ledger(**{name: int(count) for name, count in stated.items()})


def read_top(stated: Sequence[Sequence[float]]) -> TopTwo:
    """Read the best tokens of a step, `[[token, logit], [token, logit], ...]`, best first."""
    (best, best_logit), (second, second_logit), *others = (
        (int(token), float(logit)) for token, logit in stated
    )
    return TopTwo(best, best_logit, second, second_logit, tuple(others))
