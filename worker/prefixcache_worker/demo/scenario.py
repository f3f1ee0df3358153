"""The scenario: the chats in phases with one shared cache, and then once more without any.

```
1  one at a time     long system prompts on one worker, then on the others: cold and warm TTFT
2  side by side      all chats behind one of them on one worker, in the same steps
3  all together      chats interleaved; several workers get the same cold system prompt at once
4  the crash         a worker is killed in mid-prefill in the middle of all this
5  without a cache   the same prompts again; every answer must be the same: see `compare`
6  in mid-sentence   a worker is killed while it answers; another one goes on: see `sentence`
7  a small pool      what it evicts comes back from a disk, after a restart, too, and what it has
                   computed serves another machine: see `below`
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from prefixcache_worker.demo.chats import Assistant, Chat, Workload
from prefixcache_worker.demo.compare import TIE, Difference, Verdict, first_difference
from prefixcache_worker.demo.crash import Killable, attempts, crash
from prefixcache_worker.demo.dispatcher import Dispatcher
from prefixcache_worker.demo.record import Request, Run
from prefixcache_worker.demo.transcript import Transcript
from prefixcache_worker.demo.view import View
from prefixcache_worker.demo.watch import Watch

IN_HAND: Final = 2
"""Requests that a worker has at the same time, on average."""
CRASH: Final = "travel"
"""The assistant whose system prompt is being computed when the worker dies."""
LONG_TOKENS: Final = 900
"""System prompts from this length on are first played one request at a time."""
CRASH_AFTER: Final = 0.4
"""Part of the phase's other requests that are answered before the crash."""


@dataclass
class Scenario:
    """The shared run.

    Attributes:
        workload: the assistants and the chats.
        transcripts: by chat id.
        dispatcher: hands requests to workers.
        watch: looks at the service.
        view: shows what happens.
        run: filled with what was seen.
        grouped: whether workers read once a step what sequences share.
    """

    workload: Workload
    transcripts: Mapping[str, Transcript]
    dispatcher: Dispatcher
    watch: Watch
    view: View
    run: Run
    grouped: bool = True
    _num_system: dict[str, int] = field(default_factory=dict)
    _slots: asyncio.Semaphore = field(init=False)
    _num_done: int = 0
    _successor: Request | None = None

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(IN_HAND * len(self.dispatcher.workers))
        for chat in self.workload.chats:
            if chat.assistant.name not in self._num_system:
                transcript = self.transcripts[chat.id]
                self._num_system[chat.assistant.name] = transcript.num_system_tokens()

    async def execute(
        self,
        victim: Killable | None,
        *,
        victim_name: str = "",
        worker_id: str = "",
        chunk: int = 256,
    ) -> None:
        """Go through all phases.  Without a victim (one worker only) there is no crash."""
        played = await self._one_at_a_time()
        await self._side_by_side(played)
        crash_chats = [c for c in self.workload.chats if c.assistant.name == CRASH]
        others = [c for c in self.workload.chats if c.assistant.name != CRASH]
        self.view.phase(
            3,
            "All together",
            "The chats are interleaved and move from worker to worker with every turn; new system "
            "prompts are sent to several workers at the same moment.",
        )
        async with asyncio.TaskGroup() as group:
            begun = self._num_done
            for chat in _interleaved(others, played):
                group.create_task(self._chat(chat, first_turn=played.get(chat.id, 0)))
            if victim is None:
                for chat in crash_chats:
                    group.create_task(self._chat(chat))
            else:
                total = sum(len(chat.turns) - played.get(chat.id, 0) for chat in others)
                await self.dispatcher.until(lambda: self._num_done - begun >= CRASH_AFTER * total)
                await self._crash(group, crash_chats, victim, victim_name, worker_id)
        if self.run.death is not None and self._successor is not None:
            interrupted = attempts(
                self.dispatcher.interrupted,
                self._successor,
                chunk=chunk,
                block_size=self.run.block_size,
            )
            self.run.death = replace(self.run.death, attempts=interrupted)
            self.view.settled(self.run.death)

    async def _one_at_a_time(self) -> dict[str, int]:
        """Play the first turns of some chats with long system prompts, one after the other.

        Returns:
            How many turns of a chat are played.
        """
        self.view.phase(
            1,
            "One at a time",
            "A long system prompt is computed by one worker, then read in place by the others.",
        )
        names = list(self.dispatcher.workers)
        played: dict[str, int] = {}
        for assistant in self._long_assistants():
            for i, chat in enumerate(_of(self.workload, assistant)[: max(len(names), 2)]):
                request = self._request(chat, 0)
                request.alone = True
                await self._ask(request, names[i % len(names)])
                played[chat.id] = 1
        return played

    async def _side_by_side(self, played: dict[str, int]) -> None:
        """Play the next turn of all chats behind each long system prompt at once, on one worker."""
        self.view.phase(
            2,
            "Side by side",
            "All chats behind a long system prompt are answered by one worker at the same time"
            + (
                ": a step of decoding reads keys and values of that prompt once for all of them."
                if self.grouped
                else ", in the same steps, and still each has the bits that it has alone."
            ),
        )
        names = list(self.dispatcher.workers)
        async with asyncio.TaskGroup() as group:
            for i, assistant in enumerate(self._long_assistants()):
                for chat in _of(self.workload, assistant):
                    request = self._request(chat, played.get(chat.id, 0))
                    request.beside = True
                    group.create_task(self._ask(request, names[i % len(names)]))
                    played[chat.id] = played.get(chat.id, 0) + 1

    def _long_assistants(self) -> list[Assistant]:
        """Find who has a long system prompt, but for the one that the crash is about."""
        return [
            assistant
            for assistant in self.workload.assistants.values()
            if assistant.name != CRASH and self._num_system[assistant.name] >= LONG_TOKENS
        ]

    async def _chat(self, chat: Chat, first_turn: int = 0) -> None:
        for turn in range(first_turn, len(chat.turns)):
            async with self._slots:
                await self._ask(self._request(chat, turn))

    async def _crash(
        self,
        group: asyncio.TaskGroup,
        chats: Sequence[Chat],
        victim: Killable,
        victim_name: str,
        worker_id: str,
    ) -> None:
        self.view.phase(
            4,
            "The crash",
            f"{victim_name} gets a new, long system prompt, another worker waits for the same one, "
            f"and {victim_name} is killed with SIGKILL before it has computed all of it.",
        )
        successor = min(
            (n for n in self.dispatcher.workers if n != victim_name), key=self.dispatcher.load
        )
        first, second = (self._request(chat, 0) for chat in chats[:2])
        tasks: list[asyncio.Task[Request]] = []

        def ask(request: Request, worker: str) -> asyncio.Task[Request]:
            tasks.append(group.create_task(self._ask(request, worker)))
            return tasks[-1]

        death = await crash(
            self.dispatcher,
            self.watch,
            victim,
            victim_name=victim_name,
            worker_id=worker_id,
            successor_name=successor,
            first=first,
            second=second,
            ask=ask,
        )
        self.run.death = death
        self.view.died(death)
        await asyncio.gather(*tasks)
        self._successor = second
        for i, chat in enumerate(chats):
            group.create_task(self._chat(chat, first_turn=int(i < 2)))

    def _request(self, chat: Chat, turn: int) -> Request:
        name = chat.assistant.name
        prompt = tuple(self.transcripts[chat.id].ask(turn))
        return Request(f"{chat.id}/{turn + 1}", chat.id, turn, name, prompt, self._num_system[name])

    async def _ask(self, request: Request, worker: str | None = None) -> Request:
        self.run.requests.append(request)
        await self.dispatcher.ask(request, worker)
        request.text = self.transcripts[request.chat].answer(request.answer)
        self._num_done += 1
        self.view.finished(request)
        return request


async def without_cache(
    shared: Sequence[Request],
    dispatcher: Dispatcher,
    run: Run,
    on_compared: Callable[[Request, Sequence[Difference]], None],
    *,
    tie: float = TIE,
    bits: bool = False,
) -> Verdict:
    """Give the prompts of the shared run to workers without a cache, and compare every answer.

    Args:
        shared: the requests of the shared run.
        dispatcher: with workers that have no cache, and `log_logits` set.
        run: filled with the requests of this run.
        on_compared: told of each answer and of its differences.
        tie: logits no further apart are a numerical tie.
        bits: compare the two best logits of each step bit for bit; both runs have told them.
    """
    slots = asyncio.Semaphore(IN_HAND * len(dispatcher.workers))
    differences: list[Difference] = []

    async def again(request: Request) -> None:
        async with slots:
            found = await _compare(request, dispatcher, run, tie, bits=bits)
        differences.extend(found)
        on_compared(request, found)

    async with asyncio.TaskGroup() as group:
        for request in shared:
            group.create_task(again(request))
    num_tokens = sum(len(request.answer) for request in shared)
    return Verdict(len(shared), num_tokens, tuple(differences), of_bits=bits)


async def _compare(
    shared: Request, dispatcher: Dispatcher, run: Run, tie: float, *, bits: bool
) -> list[Difference]:
    """Compare one answer; after a numerical tie, the rest of it from where the runs agree again."""
    found: list[Difference] = []
    start = 0
    while start < len(shared.answer) or not found:
        replay = Request(
            shared.id if start == 0 else f"{shared.id}+{start}",
            shared.chat,
            shared.turn,
            shared.assistant,
            (*shared.prompt, *shared.answer[:start]),
            shared.num_system,
        )
        if start == 0:
            run.requests.append(replay)
        await dispatcher.ask(replay)
        # A replay may answer longer than what is left of the shared answer: its limit is the same.
        answer = replay.answer[: dispatcher.answer_tokens - start]
        difference = first_difference(
            shared.id,
            shared.answer[start:],
            answer,
            replay.logits,
            start=start,
            tie=tie,
            bits=shared.logits[start:] if bits else None,
        )
        if difference is None:
            break
        found.append(difference)
        if not difference.tie:
            break
        start = difference.position + 1
    return found


def _of(workload: Workload, assistant: Assistant) -> list[Chat]:
    return [chat for chat in workload.chats if chat.assistant == assistant]


def _interleaved(chats: Sequence[Chat], played: Mapping[str, int]) -> list[Chat]:
    """Order chats so that two of every new system prompt begin together, then all take turns.

    The first requests go to different workers one after the other, so that the two of a pair are
    computed at the same moment: one computes the prefix and the other joins it.
    """
    new: dict[str, list[Chat]] = {}
    rest: list[Chat] = []
    known = {chat.assistant.name for chat in chats if chat.id in played}
    for chat in chats:
        pair = new.setdefault(chat.assistant.name, [])
        if chat.assistant.name not in known and len(pair) < 2:
            pair.append(chat)
        else:
            rest.append(chat)
    return [chat for pair in new.values() for chat in pair] + rest
