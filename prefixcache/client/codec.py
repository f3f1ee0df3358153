"""Words to messages and back: the one place that knows the dataclasses and the protobuf fields.

`write_*` fill a message in place (a sub-message is never copied), `read_*` give the word back.  The
service writes answers, the clients read them.  Token and block ids are moved as one buffer: nothing
here loops over tokens or blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any, Final

from prefixcache import errors
from prefixcache.errors import CacheError, PoolExhausted
from prefixcache.types import (
    Attachment,
    BlockId,
    Committed,
    Copy,
    Ended,
    Explanation,
    Grant,
    Layout,
    LeaseId,
    LeaseInfo,
    Ledger,
    Lookup,
    Namespace,
    Partial,
    PastRequest,
    PinInfo,
    Pinned,
    PoolHandle,
    QuotaInfo,
    Released,
    Reset,
    Snapshot,
    Span,
    TableUpdate,
    Unpinned,
    WorkerId,
)
from prefixcache.v1 import prefixcache_pb2 as pb

DTYPES: Final = {
    "bfloat16": pb.ELEMENT_TYPE_BFLOAT16,
    "float16": pb.ELEMENT_TYPE_FLOAT16,
    "float32": pb.ELEMENT_TYPE_FLOAT32,
}
POOL_KINDS: Final = {
    "shm": pb.POOL_KIND_SHM,
    "cuda-ipc": pb.POOL_KIND_CUDA_IPC,
    "none": pb.POOL_KIND_NONE,
}
PARTIALS: Final = {
    Partial.OFF: pb.PARTIAL_REUSE_OFF,
    Partial.BLOCKS: pb.PARTIAL_REUSE_BLOCKS,
    Partial.TAILS: pb.PARTIAL_REUSE_TAILS,
}
FATES: Final = {
    "hit": pb.FATE_HIT,
    "partial": pb.FATE_PARTIAL,
    "joined": pb.FATE_JOINED,
    "cold": pb.FATE_COLD,
    "evicted": pb.FATE_EVICTED,
    "granularity": pb.FATE_GRANULARITY,
}
_DTYPE_NAMES = {number: name for name, number in DTYPES.items()}
_POOL_KIND_NAMES = {number: name for name, number in POOL_KINDS.items()}
_FATE_NAMES = {number: name for name, number in FATES.items()}

# ---------------------------------------------------------------------------------- the words


def write_namespace(word: Namespace, message: pb.Namespace) -> None:
    """Fill `message`."""
    message.model = word.model
    message.adapter = word.adapter
    message.tenant = word.tenant
    message.salt = word.salt


def read_namespace(message: pb.Namespace) -> Namespace:
    """Read what `write_namespace` wrote."""
    return Namespace(message.model, message.adapter, message.tenant, message.salt)


def write_layout(word: Layout, message: pb.Layout) -> None:
    """Fill `message`.

    Raises:
        InvalidRequest: the element type cannot be held by a pool, or a number is out of range.
    """
    if word.dtype not in DTYPES:
        raise errors.InvalidRequest(
            f"a pool cannot hold {word.dtype!r}; it can hold {', '.join(DTYPES)}"
        )
    message.num_layers = word.num_layers
    message.num_kv_heads = word.num_kv_heads
    message.head_dim = word.head_dim
    message.dtype = DTYPES[word.dtype]


def read_layout(message: pb.Layout) -> Layout:
    """Read what `write_layout` wrote; a type that this version does not know reads as `""`."""
    return Layout(
        message.num_layers,
        message.num_kv_heads,
        message.head_dim,
        _DTYPE_NAMES.get(message.dtype, ""),
    )


def write_pool(word: PoolHandle, message: pb.PoolHandle) -> None:
    """Fill `message`."""
    message.kind = POOL_KINDS[word.kind]
    message.name = word.name
    message.num_blocks = word.num_blocks
    message.block_size = word.block_size
    write_layout(word.layout, message.layout)
    message.epoch = word.epoch
    message.offset = word.offset


def read_pool(message: pb.PoolHandle) -> PoolHandle:
    """Read what `write_pool` wrote; a kind that this version does not know reads as `"unknown"`."""
    return PoolHandle(
        _POOL_KIND_NAMES.get(message.kind, "unknown"),
        message.name,
        message.num_blocks,
        message.block_size,
        read_layout(message.layout),
        message.epoch,
        message.offset,
    )


def write_ledger(word: Ledger, message: pb.Ledger) -> None:
    """Fill `message`.  Zeros are not written: most ledgers have two or three fields."""
    if word.hit:
        message.hit = word.hit
    if word.partial:
        message.partial = word.partial
    if word.joined:
        message.joined = word.joined
    if word.cold:
        message.cold = word.cold
    if word.evicted:
        message.evicted = word.evicted
    if word.granularity:
        message.granularity = word.granularity


def read_ledger(message: pb.Ledger) -> Ledger:
    """Read what `write_ledger` wrote."""
    return Ledger(
        message.hit,
        message.partial,
        message.joined,
        message.cold,
        message.evicted,
        message.granularity,
    )


def _write_copies(copies: tuple[Copy, ...], messages: Any) -> None:
    for copy in copies:
        messages.add(src=copy.src, dst=copy.dst, num_tokens=copy.num_tokens)


def _read_copies(messages: Iterable[pb.Copy]) -> tuple[Copy, ...]:
    return tuple([Copy(BlockId(m.src), BlockId(m.dst), m.num_tokens) for m in messages])


# -------------------------------------------------------------------------------- the answers


def read_attach(message: pb.AttachResponse) -> Attachment:
    """Read an answer of attach.  The key and the limits stay with the message."""
    return Attachment(WorkerId(message.worker), read_pool(message.pool), message.ttl_s)


def write_grant(answer: Grant, message: pb.Grant) -> None:
    """Fill `message`: one lease."""
    message.lease = answer.lease
    message.block_table = answer.block_table.tobytes()
    message.num_cached = answer.num_cached
    message.num_pending = answer.num_pending
    if answer.copies:
        _write_copies(answer.copies, message.copies)
    write_ledger(answer.ledger, message.ledger)
    message.ttl_s = answer.ttl_s


def read_grant(message: pb.Grant) -> Grant:
    """Read what `write_grant` wrote."""
    return Grant(
        LeaseId(message.lease),
        array("i", message.block_table),
        message.num_cached,
        message.num_pending,
        _read_copies(message.copies),
        read_ledger(message.ledger),
        message.ttl_s,
    )


def write_acquire(answer: Grant, message: pb.AcquireResponse) -> None:
    """Fill `message`."""
    write_grant(answer, message.grant)


def read_acquire(message: pb.AcquireResponse) -> Grant:
    """Read what `write_acquire` wrote."""
    return read_grant(message.grant)


def write_fork(answer: tuple[Grant, ...], message: pb.ForkResponse) -> None:
    """Fill `message`: the children."""
    message.SetInParent()
    for grant in answer:
        write_grant(grant, message.children.add())


def read_fork(message: pb.ForkResponse) -> tuple[Grant, ...]:
    """Read what `write_fork` wrote."""
    return tuple([read_grant(child) for child in message.children])


def write_commit(answer: Committed, message: pb.CommitResponse) -> None:
    """Fill `message`."""
    message.num_tokens = answer.num_tokens
    message.num_indexed = answer.num_indexed


def read_commit(message: pb.CommitResponse) -> Committed:
    """Read what `write_commit` wrote."""
    return Committed(message.num_tokens, message.num_indexed)


def write_update(answer: TableUpdate, message: pb.ExtendResponse | pb.TruncateResponse) -> None:
    """Fill `message`: how a block table changed."""
    message.keep = answer.keep
    if answer.blocks:
        message.blocks = answer.blocks.tobytes()
    if answer.copies:
        _write_copies(answer.copies, message.copies)


def read_update(message: pb.ExtendResponse | pb.TruncateResponse) -> TableUpdate:
    """Read what `write_update` wrote."""
    return TableUpdate(message.keep, array("i", message.blocks), _read_copies(message.copies))


def write_release(answer: Released, message: pb.ReleaseResponse) -> None:
    """Fill `message`."""
    message.num_freed = answer.num_freed


def read_release(message: pb.ReleaseResponse) -> Released:
    """Read what `write_release` wrote."""
    return Released(message.num_freed)


def write_nothing(answer: None, message: pb.RenewResponse | pb.CancelResponse) -> None:
    """Say in `message` that the op was done; there is nothing else to say."""
    message.SetInParent()


def read_nothing(message: pb.RenewResponse | pb.CancelResponse) -> None:
    """Read what `write_nothing` wrote."""


def write_detach(answer: Ended, message: pb.DetachResponse) -> None:
    """Fill `message`."""
    message.leases.extend(answer.leases)
    message.num_freed = answer.num_freed
    message.num_quarantined = answer.num_quarantined


def read_detach(message: pb.DetachResponse) -> Ended:
    """Read what `write_detach` wrote."""
    leases = tuple([LeaseId(lease) for lease in message.leases])
    return Ended(leases, message.num_freed, message.num_quarantined)


def write_lookup(answer: Lookup, message: pb.LookupResponse) -> None:
    """Fill `message`."""
    message.num_tokens = answer.num_tokens
    message.num_hit = answer.num_hit
    message.num_partial = answer.num_partial
    message.num_pending = answer.num_pending


def read_lookup(message: pb.LookupResponse) -> Lookup:
    """Read what `write_lookup` wrote."""
    return Lookup(message.num_tokens, message.num_hit, message.num_partial, message.num_pending)


def write_explain(answer: Explanation, message: pb.ExplainResponse) -> None:
    """Fill `message`."""
    for span in answer.spans:
        message.spans.add(start=span.start, end=span.end, fate=FATES[span.fate])
    write_ledger(answer.ledger, message.ledger)
    if answer.parted_at is not None:
        message.parted_at = answer.parted_at
    message.stored_next = answer.stored_next
    message.num_parted = answer.num_parted
    if answer.resumes_at is not None:
        message.resumes_at = answer.resumes_at
        message.num_same = answer.num_same
    if answer.extra_blocks is not None:
        message.extra_blocks = answer.extra_blocks
    message.num_pending = answer.num_pending
    for namespace, num_tokens in answer.elsewhere:
        write_namespace(namespace, message.elsewhere.add(num_tokens=num_tokens).namespace)
    if answer.past is not None:
        _write_past(answer.past, message.past)


def _write_past(word: PastRequest, message: pb.PastRequest) -> None:
    message.request_id = word.request_id
    message.worker = word.worker
    message.lease = word.lease
    write_namespace(word.namespace, message.namespace)
    message.age_s = word.age_s
    message.num_tokens = word.num_tokens
    message.tokens = word.tokens


def read_explain(message: pb.ExplainResponse) -> Explanation:
    """Read what `write_explain` wrote."""
    return Explanation(
        tuple([Span(m.start, m.end, _FATE_NAMES.get(m.fate, "unknown")) for m in message.spans]),
        read_ledger(message.ledger),
        message.parted_at if message.HasField("parted_at") else None,
        message.stored_next,
        message.num_parted,
        message.resumes_at if message.HasField("resumes_at") else None,
        message.num_same,
        message.extra_blocks if message.HasField("extra_blocks") else None,
        message.num_pending,
        tuple([(read_namespace(m.namespace), m.num_tokens) for m in message.elsewhere]),
        _read_past(message.past) if message.HasField("past") else None,
    )


def _read_past(message: pb.PastRequest) -> PastRequest:
    return PastRequest(
        message.request_id,
        WorkerId(message.worker),
        LeaseId(message.lease),
        read_namespace(message.namespace),
        message.age_s,
        message.num_tokens,
        message.tokens,
    )


def write_reset(answer: Reset, message: pb.ResetResponse) -> None:
    """Fill `message`."""
    message.num_blocks = answer.num_blocks
    message.num_leased = answer.num_leased
    message.num_leases = answer.num_leases
    message.num_pins = answer.num_pins


def read_reset(message: pb.ResetResponse) -> Reset:
    """Read what `write_reset` wrote."""
    return Reset(message.num_blocks, message.num_leased, message.num_leases, message.num_pins)


def write_fields(answer: Pinned | Unpinned, message: pb.PinResponse | pb.UnpinResponse) -> None:
    """Fill `message`, whose fields have the names of the answer's."""
    message.SetInParent()
    for name in answer.__dataclass_fields__:
        setattr(message, name, getattr(answer, name))


def read_pin(message: pb.PinResponse) -> Pinned:
    """Read what `write_fields` wrote."""
    return Pinned(**{name: getattr(message, name) for name in Pinned.__dataclass_fields__})


def read_unpin(message: pb.UnpinResponse) -> Unpinned:
    """Read what `write_fields` wrote."""
    return Unpinned(**{name: getattr(message, name) for name in Unpinned.__dataclass_fields__})


def write_quota(answer: QuotaInfo, message: pb.QuotaResponse) -> None:
    """Fill `message`."""
    _write_quota(answer, message.quota)


def read_quota(message: pb.QuotaResponse) -> QuotaInfo:
    """Read what `write_quota` wrote."""
    return _read_quota(message.quota)


def _write_quota(word: QuotaInfo, message: pb.QuotaInfo) -> None:
    message.tenant = word.tenant
    if word.namespace is not None:
        message.namespace.SetInParent()
        write_namespace(word.namespace, message.namespace)
    if word.max_held is not None:
        message.max_held = word.max_held
    message.guaranteed = word.guaranteed
    message.num_held = word.num_held
    message.num_stored = word.num_stored


def _read_quota(message: pb.QuotaInfo) -> QuotaInfo:
    return QuotaInfo(
        tenant=message.tenant,
        namespace=read_namespace(message.namespace) if message.HasField("namespace") else None,
        max_held=message.max_held if message.HasField("max_held") else None,
        guaranteed=message.guaranteed,
        num_held=message.num_held,
        num_stored=message.num_stored,
    )


def write_snapshot(answer: Snapshot, message: pb.SnapshotResponse) -> None:
    """Fill `message`, all but `service`.  O(leases + namespaces)."""
    for name in _SNAPSHOT_NUMBERS:
        setattr(message, name, getattr(answer, name))
    for info in answer.leases:
        lease = message.leases.add(
            lease=info.lease,
            worker=info.worker,
            num_tokens=info.num_tokens,
            num_committed=info.num_committed,
            num_blocks=info.num_blocks,
            expires_in_s=info.expires_in_s,
        )
        write_namespace(info.namespace, lease.namespace)
    write_ledger(answer.ledger, message.ledger)
    for namespace, ledger in answer.namespaces.items():
        entry = message.namespaces.add()
        write_namespace(namespace, entry.namespace)
        write_ledger(ledger, entry.ledger)
    for pin in answer.pins:
        told = message.pins.add(
            num_tokens=pin.num_tokens, num_blocks=pin.num_blocks, expires_in_s=pin.expires_in_s
        )
        write_namespace(pin.namespace, told.namespace)
    for quota in answer.quotas:
        _write_quota(quota, message.quotas.add())
    for extra_blocks, tokens in answer.shortage:
        message.shortage.add(extra_blocks=extra_blocks, tokens=tokens)


def read_snapshot(message: pb.SnapshotResponse) -> Snapshot:
    """Read what `write_snapshot` wrote."""
    numbers: dict[str, Any] = {name: getattr(message, name) for name in _SNAPSHOT_NUMBERS}
    return Snapshot(
        leases=tuple([_read_lease(info) for info in message.leases]),
        ledger=read_ledger(message.ledger),
        namespaces={read_namespace(m.namespace): read_ledger(m.ledger) for m in message.namespaces},
        pins=tuple(
            [
                PinInfo(read_namespace(m.namespace), m.num_tokens, m.num_blocks, m.expires_in_s)
                for m in message.pins
            ]
        ),
        quotas=tuple([_read_quota(quota) for quota in message.quotas]),
        shortage=tuple([(m.extra_blocks, m.tokens) for m in message.shortage]),
        **numbers,
    )


def _read_lease(message: pb.LeaseInfo) -> LeaseInfo:
    return LeaseInfo(
        LeaseId(message.lease),
        WorkerId(message.worker),
        read_namespace(message.namespace),
        message.num_tokens,
        message.num_committed,
        message.num_blocks,
        message.expires_in_s,
    )


_SNAPSHOT_NUMBERS: Final = (
    "num_blocks",
    "block_size",
    "free",
    "private",
    "indexed",
    "quarantined",
    "evictable",
    "ghosts",
    "nodes",
    "waiting",
    "evicted",
    "requests",
    "pinned",
    "max_pinned",
)

WRITE: Final[dict[str, Callable[[Any, Any], None]]] = {
    "acquire": write_acquire,
    "cancel": write_nothing,
    "commit": write_commit,
    "extend": write_update,
    "fork": write_fork,
    "truncate": write_update,
    "release": write_release,
    "renew": write_nothing,
    "detach": write_detach,
    "lookup": write_lookup,
    "explain": write_explain,
    "reset": write_reset,
    "pin": write_fields,
    "unpin": write_fields,
    "quota": write_quota,
}
"""How the service writes the answer of each verb (attach and snapshot carry more)."""

READ: Final[dict[str, Callable[[Any], Any]]] = {
    "attach": lambda message: message,
    "acquire": read_acquire,
    "cancel": read_nothing,
    "commit": read_commit,
    "extend": read_update,
    "fork": read_fork,
    "truncate": read_update,
    "release": read_release,
    "renew": read_nothing,
    "detach": read_detach,
    "lookup": read_lookup,
    "explain": read_explain,
    "reset": read_reset,
    "pin": read_pin,
    "unpin": read_unpin,
    "quota": read_quota,
    "snapshot": read_snapshot,
}
"""How a client reads the answer of each verb."""

# ---------------------------------------------------------------------------------- the errors

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
