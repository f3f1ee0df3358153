"""The one exception tree: one class, one gRPC status; messages say what, how much, what to do.

```
CacheError                  UNKNOWN
├── InvalidRequest          INVALID_ARGUMENT     the request can never be served as it is
│   └── LayoutMismatch      INVALID_ARGUMENT     another shape of keys and values than the pool's
├── NotFound                NOT_FOUND            no such lease, worker or ticket (or not yours)
├── Unauthenticated         UNAUTHENTICATED      the service does not know who is calling
├── PermissionDenied        PERMISSION_DENIED    known, but it takes an admin
├── LeaseExpired            FAILED_PRECONDITION  the lease ended before this call
├── EpochMismatch           FAILED_PRECONDITION  the handle belongs to another life of the pool
├── PoolExhausted           RESOURCE_EXHAUSTED   not enough free and evictable blocks now
│   └── QuotaExceeded       RESOURCE_EXHAUSTED   the namespace or its tenant may not hold so many
├── Unsupported             UNIMPLEMENTED        understood, but not built for this device or model
└── ServiceUnavailable      UNAVAILABLE          no service at that address (client side)
```
"""

from __future__ import annotations

from typing import ClassVar


class CacheError(Exception):
    """Base of all errors of prefixcache.  Nothing was changed by the call that raised it."""

    code: ClassVar[str] = "UNKNOWN"
    """Name of the gRPC status."""


class InvalidRequest(CacheError):
    """The request can never be served as it is."""

    code = "INVALID_ARGUMENT"


class LayoutMismatch(InvalidRequest):
    """The keys and values have another shape than the pool's."""


class NotFound(CacheError):
    """There is no such lease, worker or ticket, or it belongs to somebody else."""

    code = "NOT_FOUND"


class Unauthenticated(CacheError):
    """The service does not know who is calling: no proof, or one that proves nothing."""

    code = "UNAUTHENTICATED"


class PermissionDenied(CacheError):
    """The caller is known, and may not do this.  What others have is `NotFound` instead."""

    code = "PERMISSION_DENIED"


class LeaseExpired(CacheError):
    """The lease ended before this call."""

    code = "FAILED_PRECONDITION"


class EpochMismatch(CacheError):
    """The handle belongs to another life of the pool."""

    code = "FAILED_PRECONDITION"


class PoolExhausted(CacheError):
    """Not enough free and evictable blocks now.

    `retry_after_s` is a hint: when the next lease ends at the latest.
    """

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceeded(PoolExhausted):
    """The namespace, or its tenant, may not hold so many blocks."""


class Unsupported(CacheError):
    """Understood, but not built for this device or model."""

    code = "UNIMPLEMENTED"


class ServiceUnavailable(CacheError):
    """No service answers at that address."""

    code = "UNAVAILABLE"


BY_CODE: dict[str, type[CacheError]] = {
    cls.code: cls
    for cls in (
        CacheError,
        LeaseExpired,
        InvalidRequest,
        NotFound,
        PermissionDenied,
        PoolExhausted,
        Unauthenticated,
        Unsupported,
        ServiceUnavailable,
    )
}
"""The class that a client raises for a gRPC status that carries no detail of its own."""
