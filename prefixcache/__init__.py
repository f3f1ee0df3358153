"""One KV cache for all LLM serving processes of a machine.

```python
import prefixcache

with prefixcache.connect() as cache:
    session = cache.attach(model="llama-3.2-1b", layout=layout)
    with session.acquire(tokens, wait_s=0.2) as lease:
        ...  # copy lease.copies, compute from lease.num_cached on
        lease.commit(len(tokens))
```

The client is imported on first use, so that the words, the core and the experiments start without
gRPC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefixcache.errors import (
    CacheError,
    EpochMismatch,
    InvalidRequest,
    LayoutMismatch,
    LeaseExpired,
    NotFound,
    PermissionDenied,
    PoolExhausted,
    QuotaExceeded,
    ServiceUnavailable,
    Unauthenticated,
    Unsupported,
)
from prefixcache.types import Layout, Namespace, pack, unpack

if TYPE_CHECKING:
    from prefixcache.client import (
        AsyncClient,
        AsyncLease,
        AsyncSession,
        Client,
        Lease,
        MediaItem,
        Session,
        Tls,
        connect,
        connect_async,
        media_keys,
    )

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncLease",
    "AsyncSession",
    "CacheError",
    "Client",
    "EpochMismatch",
    "InvalidRequest",
    "Layout",
    "LayoutMismatch",
    "Lease",
    "LeaseExpired",
    "MediaItem",
    "Namespace",
    "NotFound",
    "PermissionDenied",
    "PoolExhausted",
    "QuotaExceeded",
    "ServiceUnavailable",
    "Session",
    "Tls",
    "Unauthenticated",
    "Unsupported",
    "connect",
    "connect_async",
    "media_keys",
    "pack",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'prefixcache' has no attribute {name!r}")
    from prefixcache import client

    return getattr(client, name)
