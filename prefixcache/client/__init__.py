"""What a serving process imports: connect to the service, attach, lease blocks.

`connect` gives the synchronous client, `connect_async` its twin for asyncio.  Losing the service is
a slowdown, never an outage: every call raises `ServiceUnavailable`, and `session.alive` is False.
"""

from prefixcache.client.async_client import AsyncClient, connect_async
from prefixcache.client.async_session import AsyncBatch, AsyncLease, AsyncSession
from prefixcache.client.client import Client, connect
from prefixcache.client.credentials import Tls
from prefixcache.client.media import MediaItem, media_keys
from prefixcache.client.ops import Reply
from prefixcache.client.progress import Inbox
from prefixcache.client.session import Batch, Lease, Session

__all__ = [
    "AsyncBatch",
    "AsyncClient",
    "AsyncLease",
    "AsyncSession",
    "Batch",
    "Client",
    "Inbox",
    "Lease",
    "MediaItem",
    "Reply",
    "Session",
    "Tls",
    "connect",
    "connect_async",
    "media_keys",
]
