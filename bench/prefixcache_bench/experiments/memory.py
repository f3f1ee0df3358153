"""What KV memory is used for, by accounting alone: contiguous reservations against paged blocks.

A server is kept saturated: requests wait in line, are admitted first come first served whenever the
next one fits, and all that run get one token a step.  Every step, each slot of the memory is

* **useful**: it holds a token;
* **reserved**: promised to a running request, which will use it later;
* **internal**: promised to a running request, which will never use it;
* **external**: promised to nobody, and the next in line does not fit.

Contiguous memory comes from a buddy allocator, as is usual for it; what its rounding wastes counts
as external.  Paged memory comes from the service's own `BlockPool`; when it is exhausted, the
youngest request gives its blocks back and waits at the head of the line.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from prefixcache.core.block_pool import BlockPool
from prefixcache.errors import InvalidRequest
from prefixcache.types import TOKEN_BYTES, BlockTable
from prefixcache_bench.experiments.traces import Trace


class Reservation(StrEnum):
    """How much contiguous memory a request gets before it begins."""

    MAX = "reserve-max"
    """As much as the longest sequence that is allowed."""
    POWER_OF_TWO = "reserve-power-of-two"
    """The prompt, and the answer's length rounded up to a power of two."""
    ORACLE = "oracle"
    """Exactly what it will need, known in advance."""


@dataclass(frozen=True, slots=True)
class Job:
    """Lengths of one request, in tokens."""

    prompt: int
    answer: int

    @property
    def total(self) -> int:
        """Tokens at its end."""
        return self.prompt + self.answer


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of the memory, averaged over the steps of a saturated server.  They add up to 1."""

    useful: float
    reserved: float
    internal: float
    external: float
    running: float
    """Requests that run at the same time."""
    steps: int
    """During which the memory was full: somebody waited.  0: it never was, and nothing is said."""


def jobs_of(trace: Trace, *, longest: int, history: bool, limit: int) -> list[Job]:
    """Take the lengths of a trace's requests.

    Args:
        trace: A trace that tells the lengths of answers.
        longest: Longer ones are left out.
        history: The whole prompt; else each turn alone: the prompt without what was known already.
        limit: How many at most.

    Raises:
        InvalidRequest: the trace does not tell them, or has no request as short as that.
    """
    from prefixcache_bench.experiments.curve import LruStack

    stack = LruStack(1, len(trace))
    jobs, shortest = [], 0
    for number, request in enumerate(trace):
        if trace.answers is not None:
            answer = trace.answers[number]
        else:
            answer = 0 if trace.is_hashed else len(request.tokens) // TOKEN_BYTES - request.prompt
        prompt = request.length
        if not history:
            known = sum(length for _, length in stack.touch(request.namespace, request.tokens))
            prompt -= min(known * trace.unit, prompt - 1)
        if answer <= 0:
            continue
        total = prompt + answer
        shortest = min(shortest or total, total)
        if total <= longest:
            jobs.append(Job(prompt, answer))
            if len(jobs) == limit:
                break
    if not jobs and shortest:
        raise InvalidRequest(
            f"{trace.name} has no request of at most {longest} tokens; the shortest has "
            f"{shortest} (--longest)"
        )
    if not jobs:
        raise InvalidRequest(f"{trace.name} does not tell the lengths of answers")
    return jobs


def contiguous(jobs: Sequence[Job], slots: int, reservation: Reservation, longest: int) -> Shares:
    """Serve all jobs from contiguous memory.  O(steps · running)."""
    return _serve(jobs, slots, _Contiguous(slots, reservation, longest))


def paged(jobs: Sequence[Job], slots: int, block_size: int) -> Shares:
    """Serve all jobs from a `BlockPool`.  O(steps · running)."""
    return _serve(jobs, slots, _Paged(slots // block_size, block_size))


@dataclass(slots=True)
class _Running:
    job: Job
    tokens: int
    promised: int = 0
    place: int = 0
    blocks: BlockTable | None = None


class _Memory(Protocol):
    def admit(self, one: _Running) -> bool:
        """Give memory to begin with; False if it does not fit."""

    def grow(self, one: _Running) -> bool:
        """Make room for one more token; False if there is none."""

    def release(self, one: _Running) -> None:
        """Take everything back."""


def _serve(jobs: Sequence[Job], slots: int, memory: _Memory) -> Shares:
    line = deque(_Running(job, job.prompt) for job in jobs)
    running: list[_Running] = []
    sums = [0, 0, 0, 0]
    steps = 0
    while line or running:
        while line and memory.admit(line[0]):
            running.append(line.popleft())
        if not running:
            raise InvalidRequest(f"{slots} slots do not hold {line[0].job.total} tokens")
        if line:  # saturated
            steps += 1
            sums[0] += sum(one.tokens for one in running)
            used = [min(one.job.total, one.promised) for one in running]
            sums[1] += sum(used) - sum(one.tokens for one in running)
            sums[2] += sum(one.promised for one in running) - sum(used)
            sums[3] += len(running)
        running = _step(running, line, memory)
    useful, reserved, internal = (total / max(1, steps) / slots for total in sums[:3])
    external = 1 - useful - reserved - internal
    return Shares(useful, reserved, internal, external, sums[3] / max(1, steps), steps)


def _step(running: list[_Running], line: deque[_Running], memory: _Memory) -> list[_Running]:
    """Give every running request one token, the oldest first; the youngest yield if they must."""
    at = 0
    while at < len(running):
        one = running[at]
        if one.tokens == one.job.total:
            memory.release(one)
            del running[at]
        elif memory.grow(one):
            one.tokens += 1
            at += 1
        else:
            youngest = running.pop()
            memory.release(youngest)
            line.appendleft(youngest)
    return running


class _Paged:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._pool = BlockPool(num_blocks)
        self._size = block_size

    def admit(self, one: _Running) -> bool:
        need = -(-one.tokens // self._size)
        if need > self._pool.num_free:
            return False
        one.blocks = self._pool.allocate(need)
        one.promised = need * self._size
        return True

    def grow(self, one: _Running) -> bool:
        if one.tokens < one.promised:
            return True
        if not self._pool.num_free or one.blocks is None:
            return False
        one.blocks.extend(self._pool.allocate(1))
        one.promised += self._size
        return True

    def release(self, one: _Running) -> None:
        self._pool.release(one.blocks or array("i"))
        one.blocks = None


class _Contiguous:
    """A buddy allocator: pieces are powers of two, split in halves and joined again."""

    def __init__(self, slots: int, reservation: Reservation, longest: int) -> None:
        if slots & (slots - 1):
            raise InvalidRequest(f"{slots} slots are not a power of two")
        self._slots, self._reservation, self._longest = slots, reservation, longest
        self._free: dict[int, set[int]] = {slots: {0}}

    def admit(self, one: _Running) -> bool:
        promised = self._promise(one.job)
        piece = 1 << max(0, promised - 1).bit_length()
        size = piece
        while size <= self._slots and not self._free.get(size):
            size *= 2
        if size > self._slots:
            return False
        place = min(self._free[size])
        self._free[size].remove(place)
        while size > piece:
            size //= 2
            self._free.setdefault(size, set()).add(place + size)
        one.promised, one.place = promised, place
        return True

    def grow(self, one: _Running) -> bool:
        return one.tokens < one.promised

    def release(self, one: _Running) -> None:
        size, place = 1 << max(0, one.promised - 1).bit_length(), one.place
        while size < self._slots and place ^ size in self._free.get(size, ()):
            self._free[size].remove(place ^ size)
            place &= ~size
            size *= 2
        self._free.setdefault(size, set()).add(place)

    def _promise(self, job: Job) -> int:
        match self._reservation:
            case Reservation.MAX:
                return self._longest
            case Reservation.POWER_OF_TWO:
                answer = 1 << max(0, job.answer - 1).bit_length()
                return min(job.prompt + answer, self._longest)
            case Reservation.ORACLE:
                return job.total
