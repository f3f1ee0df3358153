"""The Watch call: a watcher's stream of events, for as long as it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefixcache.client import codec
from prefixcache.errors import CacheError, InvalidRequest
from prefixcache.service.auth.identity import Identity
from prefixcache.service.auth.standing import STANDING
from prefixcache.service.events.event_log import Batch, Event, EventLog, Removed, Stored
from prefixcache.service.grpc.bad_request import BadRequest
from prefixcache.service.handlers import Handlers
from prefixcache.service.verbs.request_texts import check_texts
from prefixcache.types import Namespace
from prefixcache.v1 import prefixcache_pb2 as pb


async def watch(
    handlers: Handlers, log: EventLog, identity: Identity, request: Any, context: Any, refuse: Any
) -> None:
    """Serve one watcher what its identity may see; refuse what cannot be served."""
    try:
        if request.__class__ is BadRequest:
            raise InvalidRequest(request)
        check_texts(request)
        if request.tokens and not handlers.settings.watch_tokens:
            raise InvalidRequest(
                "this service sends no token ids: start it with --watch-tokens, or ask for hashes"
            )
        only = None
        if request.HasField("namespace"):
            only = identity.own(codec.read_namespace(request.namespace))

        def wanted(namespace: Namespace) -> bool:
            return identity.sees(namespace) and only in (None, namespace)

        def shows_tokens(namespace: Namespace) -> bool:
            # Who names a salt may read behind it, and nobody else.
            return request.tokens and (not namespace.salt or only == namespace)

        standing = STANDING.get()
        with log.watching(identity.tenant or ""):
            async for batch in log.batches(request.from_sequence):
                if standing is not None:
                    standing.check()
                message = message_of(batch, handlers, wanted, tokens=shows_tokens)
                if message.events or message.is_snapshot:
                    await context.write(message)
    except CacheError as error:
        handlers.latency.refuse("watch", error)
        await refuse(context, error)


def message_of(
    batch: Batch,
    handlers: Handlers,
    wanted: Callable[[Namespace], bool],
    *,
    tokens: Callable[[Namespace], bool],
) -> pb.WatchResponse:
    """Write of a batch what concerns the namespaces that are wanted."""
    cache = handlers.backing.cache
    message = pb.WatchResponse(next_sequence=batch.next, is_snapshot=batch.is_snapshot)
    if batch.lost is not None:
        message.gap, message.gap_from = True, batch.lost[0]
    size = 0 if cache is None else cache.block_size
    for number, event in enumerate(batch.events, batch.first):
        if wanted(event.namespace):
            written = message.events.add()
            written.sequence = 0 if batch.is_snapshot else number
            _write(event, written, size, tokens=tokens(event.namespace))
    return message


def _write(event: Event, message: Any, block_size: int, *, tokens: bool) -> None:
    message.at = event.at
    space = event.namespace
    codec.write_namespace(Namespace(space.model, space.adapter, space.tenant), message.namespace)
    if isinstance(event, Stored):
        stored = message.stored
        stored.block_hashes.extend(event.hashes)
        stored.block_size = block_size
        stored.medium = event.medium
        if event.parent is not None:
            stored.parent_block_hash = event.parent
        if tokens:
            stored.token_ids = event.tokens
    elif isinstance(event, Removed):
        message.removed.block_hashes.extend(event.hashes)
        message.removed.medium = event.medium
    else:
        message.cleared.SetInParent()
