"""What one process alone has mapped: it is closed by a `with` block, and goes to no other."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, NoReturn, Self

from prefixcache.errors import InvalidRequest


class OfOneProcess(ABC):
    """A context manager that is of use in the process that made it, and nowhere else."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        """Of the process that made it."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the memory.  Idempotent."""

    def check_process(self) -> None:
        """Refuse a forked child what only its parent has mapped: touching it would be a signal.

        Raises:
            InvalidRequest: This is one.
        """
        if os.getpid() != self.pid:
            raise InvalidRequest(
                f"this {type(self).__name__} belongs to process {self.pid} and came through fork, "
                "which does not bring its memory: connect, attach and map in this process"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise InvalidRequest(
            f"a {type(self).__name__} cannot be pickled or copied: it is memory that one process "
            "has mapped. Connect, attach and map in the other process"
        )
