"""Parts of the service that have ended though they should live as long as it does.

A recording whose disk is full, a publisher whose task has died: the service goes on without them,
so nobody would notice.  Each tells it here, and the snapshot, `doctor`, the metrics and the log
tell it to people until the service ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import structlog

_Answer = TypeVar("_Answer")

log = structlog.get_logger(__name__)

_LONGEST = 500
"""Characters of a cause."""


class Failures:
    """What has ended, and why, by the name of the part.  Any thread may tell."""

    def __init__(self) -> None:
        self._causes: dict[str, str] = {}
        self._spared: set[str] = set()

    def tell(self, part: str, error: BaseException) -> None:
        """Say that a part has ended, and log it; with the traceback, if nobody foresaw it."""
        cause = str(error) if isinstance(error, OSError) else repr(error)
        self._causes[part] = cause[:_LONGEST]
        unforeseen = None if isinstance(error, OSError) else error
        log.error(
            f"{part} failed, the service goes on", cause=cause[:_LONGEST], exc_info=unforeseen
        )

    def forget(self, part: str) -> None:
        """Say that a part which had ended is there again.  Idempotent."""
        self._causes.pop(part, None)

    def spare(self, part: str, call: Callable[..., _Answer], *args: Any) -> _Answer | None:
        """Call a part within somebody else's step: its first error ends the part, not the step.

        Returns:
            What the call gives; None where the part has failed, now or before.
        """
        if part in self._spared:
            return None
        try:
            return call(*args)
        except Exception as error:  # noqa: BLE001 - whatever it is, the step is another's
            self._spared.add(part)
            self.tell(part, error)
            return None

    def watch(self, task: asyncio.Task[Any], part: str) -> None:
        """Tell if a task ends by an error."""

        def ended(task: asyncio.Task[Any]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self.tell(part, error)

        task.add_done_callback(ended)

    def causes(self) -> dict[str, str]:
        """Give why each part has ended."""
        return dict(self._causes)
