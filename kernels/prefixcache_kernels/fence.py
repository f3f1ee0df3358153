"""Publish what a device has written only when it has written it.

Kernels are queued and run later.  A commit that is sent when they are queued would tell other
processes to read blocks that are not there yet; a release, to write where they still read.  So what
a step has to say waits behind a mark in the stream:

```
stream     │ store_kv, attention, ... of step 7 │ mark │ step 8 ...
host       queue step 7, record, push(messages)        queue step 8 ...  pop(): [messages of 7]
```
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest

T = TypeVar("T")


class Mark(Protocol):
    """A point in a stream: `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether the device has passed it."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...


class Fence(Generic[T]):
    """Messages in order, each held back until the device has done what was queued before it.

    Use it from one thread.

    Args:
        record: Makes a mark in the present stream.
    """

    def __init__(self, record: Callable[[], Mark]) -> None:
        self._record = record
        self._held: deque[tuple[Mark, T]] = deque()

    @classmethod
    def of(cls, blocks: Tensor, streams: Sequence[torch.cuda.Stream] = ()) -> Fence[T]:
        """Make one for a pool: its device's present stream, or nothing to wait for on a CPU.

        Args:
            blocks: The pool's tensor.
            streams: Others on which work with the pool is queued; each is waited for too.

        Raises:
            InvalidRequest: One of `streams` is no stream, or they are no sequence.

        >>> fence = Fence.of(torch.zeros(1))
        >>> fence.push("committed 16 tokens")
        >>> fence.pop()
        ['committed 16 tokens']
        """
        if not isinstance(streams, Sequence):
            raise InvalidRequest(f"streams is a {type(streams).__name__}, not a sequence of them")
        for stream in streams:
            if not callable(getattr(stream, "record_event", None)):
                raise InvalidRequest(
                    f"streams has a {type(stream).__name__}, not a torch.cuda.Stream"
                )
        if not blocks.is_cuda:
            return cls(_Passed)

        def record() -> Mark:
            present = torch.cuda.current_stream(blocks.device)
            return _All([stream.record_event() for stream in (present, *streams)])

        return cls(record)

    def push(self, message: T) -> None:
        """Hold a message back until all that is queued now is done.  O(1), does not wait."""
        self._held.append((self._record(), message))

    def pop(self) -> list[T]:
        """Give the messages whose time has come, in order.  No wait."""
        ready = []
        while self._held and self._held[0][0].query():
            ready.append(self._held.popleft()[1])
        return ready

    def drain(self) -> list[T]:
        """Wait for the device; give all messages."""
        if self._held:
            self._held[-1][0].synchronize()
        ready = [message for _, message in self._held]
        self._held.clear()
        return ready

    def __len__(self) -> int:
        """Messages held back."""
        return len(self._held)


class _All:
    """Marks in several streams."""

    def __init__(self, marks: Sequence[Mark]) -> None:
        self._marks = marks

    def query(self) -> bool:
        return all(mark.query() for mark in self._marks)

    def synchronize(self) -> None:
        for mark in self._marks:
            mark.synchronize()


class _Passed:
    """A mark on a CPU, where what was called is done."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None
