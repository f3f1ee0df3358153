"""Errors as messages, and as status codes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any, Final

from prefixcache import errors
from prefixcache.errors import CacheError, InvalidRequest, PoolExhausted
from prefixcache.v1 import prefixcache_pb2 as pb

STATUS_CODES: Final = {
    "UNKNOWN": 2,
    "INVALID_ARGUMENT": 3,
    "NOT_FOUND": 5,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "UNAUTHENTICATED": 16,
}
"""Numbers of the gRPC status codes that the errors use."""
_CODE_NAMES = {number: name for name, number in STATUS_CODES.items()}
_KINDS: Final[dict[str, type[CacheError]]] = {
    cls.__name__: cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, CacheError)
}

FOREIGN_ERRORS: Final = (
    *(ValueError, TypeError, OverflowError, KeyError, AttributeError),
    RuntimeError,  # PyTorch's, of a tensor without memory
)
"""What protobuf, Python and PyTorch say of a value that no message can hold."""


def write_error(error: CacheError, message: pb.Status) -> None:
    """Fill `message`."""
    message.code = STATUS_CODES[error.code]
    message.message = str(error)
    message.kind = type(error).__name__
    message.retry_after_s = getattr(error, "retry_after_s", 0.0)


def make_error(kind: str, code: str, message: str, retry_after_s: float = 0.0) -> CacheError:
    """Give the exception of class `kind`; if that is unknown here, the one of the status `code`."""
    cls = _KINDS.get(kind) or errors.BY_CODE.get(code, CacheError)
    if issubclass(cls, PoolExhausted):
        return cls(message, retry_after_s)
    return cls(message)


def read_error(message: pb.Status) -> CacheError:
    """Read what `write_error` wrote."""
    code = _CODE_NAMES.get(message.code, "UNKNOWN")
    return make_error(message.kind, code, message.message, message.retry_after_s)


@contextmanager
def no_foreign_errors(what: str) -> Iterator[None]:
    """Turn what protobuf says of a value that no message can hold into an error of ours.

    Raises:
        InvalidRequest: it says so: a surrogate in a text, a number out of range, another type.
    """
    try:
        yield
    except FOREIGN_ERRORS as error:
        which = f"{error.object!a:.60}: " if isinstance(error, UnicodeEncodeError) else ""
        raise InvalidRequest(f"{what}: {which}{_told(error)}") from None


def put(message: Any, **fields: Any) -> None:
    """Set fields of a message.

    Raises:
        InvalidRequest: the message cannot hold one; it is named with what it is.
    """
    for name, value in fields.items():
        try:
            setattr(message, name, value)
        except FOREIGN_ERRORS as error:
            raise InvalidRequest(f"{name} is {value!a:.60}: {_told(error)}") from None


def _told(error: Exception) -> str:
    """Write what protobuf says, for people."""
    return "no UTF-8 can hold this text" if isinstance(error, UnicodeEncodeError) else str(error)


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false: a text that says no is true to Python.

    Raises:
        InvalidRequest: as said.
    """
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {value!a:.60}; it must be True or False")


def check_seconds(name: str, seconds: Any) -> None:
    """Refuse a time that nobody can wait.

    Raises:
        InvalidRequest: it is no finite number, or negative.
    """
    try:
        number = float(seconds) if isinstance(seconds, Real) else math.nan
    except OverflowError:
        number = math.inf
    if not 0 <= number < math.inf:
        raise InvalidRequest(
            f"{name} is {seconds!a:.60}; it must be a finite number of seconds from 0"
        )
