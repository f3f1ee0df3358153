"""Logging: one line per event on stderr, key=value; JSON lines where stderr is no terminal.

What others chose (names, addresses, texts of errors) is escaped here, whatever the line is.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from prefixcache.texts import escape, escape_all


def set_up(level: str) -> None:
    """Log events of at least `level` to stderr."""
    terminal = sys.stderr.isatty()
    render: Any = (
        structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _escaped,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    others = logging.StreamHandler()
    others.setFormatter(_Plain())
    others.addFilter(_of_callers)
    logging.basicConfig(handlers=[others], level=logging.WARNING)


def _of_callers(record: logging.LogRecord) -> bool:
    """Give whether a line is written, and take out of it how gRPC came to it where a caller did it.

    Who hangs up while he is answered is no event.  Bytes that are no message, and metadata that are
    no text, are one line: whoever can connect may send as many as he likes.
    """
    error = record.exc_info[1] if record.exc_info else None
    if error is None or not record.name.startswith("grpc"):
        return True
    if isinstance(error, grpc.aio.BaseError):
        return False
    if isinstance(error, DecodeError) or str(record.msg).startswith("Invalid encoding"):
        record.exc_info = record.exc_text = None
    return True


class _Plain(logging.Formatter):
    """What libraries log, escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the lines of a record."""
        return _lines(super().format(record))


def _escaped(logger: Any, method: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    return {
        key: _lines(value) if key == "exception" else escape_all(value)
        for key, value in event.items()
    }


def _lines(text: str) -> str:
    """Escape all but the ends of lines, and set in those after the first: they are no events."""
    return "\n  ".join(escape(line) for line in text.split("\n"))
