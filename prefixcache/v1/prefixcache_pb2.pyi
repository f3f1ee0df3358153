from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ElementType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ELEMENT_TYPE_UNSPECIFIED: _ClassVar[ElementType]
    ELEMENT_TYPE_BFLOAT16: _ClassVar[ElementType]
    ELEMENT_TYPE_FLOAT16: _ClassVar[ElementType]
    ELEMENT_TYPE_FLOAT32: _ClassVar[ElementType]
    ELEMENT_TYPE_FLOAT8_E4M3FN: _ClassVar[ElementType]

class PoolKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOL_KIND_UNSPECIFIED: _ClassVar[PoolKind]
    POOL_KIND_SHM: _ClassVar[PoolKind]
    POOL_KIND_CUDA_IPC: _ClassVar[PoolKind]
    POOL_KIND_NONE: _ClassVar[PoolKind]

class PartialReuse(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PARTIAL_REUSE_UNSPECIFIED: _ClassVar[PartialReuse]
    PARTIAL_REUSE_OFF: _ClassVar[PartialReuse]
    PARTIAL_REUSE_BLOCKS: _ClassVar[PartialReuse]
    PARTIAL_REUSE_TAILS: _ClassVar[PartialReuse]

class Fate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FATE_UNSPECIFIED: _ClassVar[Fate]
    FATE_HIT: _ClassVar[Fate]
    FATE_PARTIAL: _ClassVar[Fate]
    FATE_JOINED: _ClassVar[Fate]
    FATE_COLD: _ClassVar[Fate]
    FATE_EVICTED: _ClassVar[Fate]
    FATE_GRANULARITY: _ClassVar[Fate]
    FATE_RESUMED: _ClassVar[Fate]
    FATE_APPROXIMATE: _ClassVar[Fate]
    FATE_RESTORED: _ClassVar[Fate]

class TreeOrder(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TREE_ORDER_UNSPECIFIED: _ClassVar[TreeOrder]
    TREE_ORDER_TOKENS: _ClassVar[TreeOrder]
    TREE_ORDER_HEAT: _ClassVar[TreeOrder]
ELEMENT_TYPE_UNSPECIFIED: ElementType
ELEMENT_TYPE_BFLOAT16: ElementType
ELEMENT_TYPE_FLOAT16: ElementType
ELEMENT_TYPE_FLOAT32: ElementType
ELEMENT_TYPE_FLOAT8_E4M3FN: ElementType
POOL_KIND_UNSPECIFIED: PoolKind
POOL_KIND_SHM: PoolKind
POOL_KIND_CUDA_IPC: PoolKind
POOL_KIND_NONE: PoolKind
PARTIAL_REUSE_UNSPECIFIED: PartialReuse
PARTIAL_REUSE_OFF: PartialReuse
PARTIAL_REUSE_BLOCKS: PartialReuse
PARTIAL_REUSE_TAILS: PartialReuse
FATE_UNSPECIFIED: Fate
FATE_HIT: Fate
FATE_PARTIAL: Fate
FATE_JOINED: Fate
FATE_COLD: Fate
FATE_EVICTED: Fate
FATE_GRANULARITY: Fate
FATE_RESUMED: Fate
FATE_APPROXIMATE: Fate
FATE_RESTORED: Fate
TREE_ORDER_UNSPECIFIED: TreeOrder
TREE_ORDER_TOKENS: TreeOrder
TREE_ORDER_HEAT: TreeOrder

class Namespace(_message.Message):
    __slots__ = ("model", "adapter", "tenant", "salt", "approximate")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    APPROXIMATE_FIELD_NUMBER: _ClassVar[int]
    model: str
    adapter: str
    tenant: str
    salt: str
    approximate: bool
    def __init__(self, model: _Optional[str] = ..., adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., salt: _Optional[str] = ..., approximate: _Optional[bool] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_dim", "dtype", "planes", "page_bytes", "format")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PLANES_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: ElementType
    planes: int
    page_bytes: int
    format: str
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[_Union[ElementType, str]] = ..., planes: _Optional[int] = ..., page_bytes: _Optional[int] = ..., format: _Optional[str] = ...) -> None: ...

class PoolHandle(_message.Message):
    __slots__ = ("kind", "name", "num_blocks", "block_size", "layout", "epoch", "offset", "first_block")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    kind: PoolKind
    name: str
    num_blocks: int
    block_size: int
    layout: Layout
    epoch: int
    offset: int
    first_block: int
    def __init__(self, kind: _Optional[_Union[PoolKind, str]] = ..., name: _Optional[str] = ..., num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., epoch: _Optional[int] = ..., offset: _Optional[int] = ..., first_block: _Optional[int] = ...) -> None: ...

class Copy(_message.Message):
    __slots__ = ("src", "dst", "num_tokens")
    SRC_FIELD_NUMBER: _ClassVar[int]
    DST_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    src: int
    dst: int
    num_tokens: int
    def __init__(self, src: _Optional[int] = ..., dst: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class Again(_message.Message):
    __slots__ = ("first", "share")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    first: int
    share: float
    def __init__(self, first: _Optional[int] = ..., share: _Optional[float] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("start", "source", "blocks", "num_again")
    START_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_AGAIN_FIELD_NUMBER: _ClassVar[int]
    start: int
    source: int
    blocks: bytes
    num_again: int
    def __init__(self, start: _Optional[int] = ..., source: _Optional[int] = ..., blocks: _Optional[bytes] = ..., num_again: _Optional[int] = ...) -> None: ...

class Ledger(_message.Message):
    __slots__ = ("hit", "partial", "joined", "cold", "evicted", "granularity", "resumed", "approximate", "restored")
    HIT_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    COLD_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    GRANULARITY_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    APPROXIMATE_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    hit: int
    partial: int
    joined: int
    cold: int
    evicted: int
    granularity: int
    resumed: int
    approximate: int
    restored: int
    def __init__(self, hit: _Optional[int] = ..., partial: _Optional[int] = ..., joined: _Optional[int] = ..., cold: _Optional[int] = ..., evicted: _Optional[int] = ..., granularity: _Optional[int] = ..., resumed: _Optional[int] = ..., approximate: _Optional[int] = ..., restored: _Optional[int] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("code", "message", "kind", "retry_after_s")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    kind: str
    retry_after_s: float
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., kind: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("namespace", "layout", "name", "worker_key", "pid", "host", "finished", "block_size", "group")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    layout: Layout
    name: str
    worker_key: str
    pid: int
    host: str
    finished: _containers.RepeatedScalarFieldContainer[str]
    block_size: int
    group: str
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., name: _Optional[str] = ..., worker_key: _Optional[str] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., finished: _Optional[_Iterable[str]] = ..., block_size: _Optional[int] = ..., group: _Optional[str] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("worker", "worker_key", "pool", "ttl_s", "namespace_index", "max_message_bytes", "max_ops", "acquires_by_name", "reuses_as_asked", "segments")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_INDEX_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_OPS_FIELD_NUMBER: _ClassVar[int]
    ACQUIRES_BY_NAME_FIELD_NUMBER: _ClassVar[int]
    REUSES_AS_ASKED_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    worker_key: str
    pool: PoolHandle
    ttl_s: float
    namespace_index: int
    max_message_bytes: int
    max_ops: int
    acquires_by_name: bool
    reuses_as_asked: bool
    segments: Again
    def __init__(self, worker: _Optional[str] = ..., worker_key: _Optional[str] = ..., pool: _Optional[_Union[PoolHandle, _Mapping]] = ..., ttl_s: _Optional[float] = ..., namespace_index: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_ops: _Optional[int] = ..., acquires_by_name: _Optional[bool] = ..., reuses_as_asked: _Optional[bool] = ..., segments: _Optional[_Union[Again, _Mapping]] = ...) -> None: ...

class AcquireRequest(_message.Message):
    __slots__ = ("worker_key", "namespace", "namespace_index", "tokens", "reserve", "wait_s", "request_id", "recompute", "min_partial", "not_for_room", "segments")
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_FIELD_NUMBER: _ClassVar[int]
    MIN_PARTIAL_FIELD_NUMBER: _ClassVar[int]
    NOT_FOR_ROOM_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    worker_key: str
    namespace: Namespace
    namespace_index: int
    tokens: bytes
    reserve: int
    wait_s: float
    request_id: str
    recompute: bool
    min_partial: int
    not_for_room: bool
    segments: Again
    def __init__(self, worker_key: _Optional[str] = ..., namespace: _Optional[_Union[Namespace, _Mapping]] = ..., namespace_index: _Optional[int] = ..., tokens: _Optional[bytes] = ..., reserve: _Optional[int] = ..., wait_s: _Optional[float] = ..., request_id: _Optional[str] = ..., recompute: _Optional[bool] = ..., min_partial: _Optional[int] = ..., not_for_room: _Optional[bool] = ..., segments: _Optional[_Union[Again, _Mapping]] = ...) -> None: ...

class AcquireResponse(_message.Message):
    __slots__ = ("grant",)
    GRANT_FIELD_NUMBER: _ClassVar[int]
    grant: Grant
    def __init__(self, grant: _Optional[_Union[Grant, _Mapping]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("lease", "block_table", "num_cached", "num_pending", "copies", "ledger", "ttl_s", "segments", "approximate")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TABLE_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_FIELD_NUMBER: _ClassVar[int]
    NUM_PENDING_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    APPROXIMATE_FIELD_NUMBER: _ClassVar[int]
    lease: int
    block_table: bytes
    num_cached: int
    num_pending: int
    copies: _containers.RepeatedCompositeFieldContainer[Copy]
    ledger: Ledger
    ttl_s: float
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    approximate: bool
    def __init__(self, lease: _Optional[int] = ..., block_table: _Optional[bytes] = ..., num_cached: _Optional[int] = ..., num_pending: _Optional[int] = ..., copies: _Optional[_Iterable[_Union[Copy, _Mapping]]] = ..., ledger: _Optional[_Union[Ledger, _Mapping]] = ..., ttl_s: _Optional[float] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., approximate: _Optional[bool] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("op",)
    OP_FIELD_NUMBER: _ClassVar[int]
    op: int
    def __init__(self, op: _Optional[int] = ...) -> None: ...

class CancelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("worker_key", "lease", "num_tokens", "new_tokens", "request_id")
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    worker_key: str
    lease: int
    num_tokens: int
    new_tokens: bytes
    request_id: str
    def __init__(self, worker_key: _Optional[str] = ..., lease: _Optional[int] = ..., num_tokens: _Optional[int] = ..., new_tokens: _Optional[bytes] = ..., request_id: _Optional[str] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("num_tokens", "num_indexed")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_INDEXED_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    num_indexed: int
    def __init__(self, num_tokens: _Optional[int] = ..., num_indexed: _Optional[int] = ...) -> None: ...

class ExtendRequest(_message.Message):
    __slots__ = ("worker_key", "lease", "num_tokens", "wait_s", "request_id")
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    worker_key: str
    lease: int
    num_tokens: int
    wait_s: float
    request_id: str
    def __init__(self, worker_key: _Optional[str] = ..., lease: _Optional[int] = ..., num_tokens: _Optional[int] = ..., wait_s: _Optional[float] = ..., request_id: _Optional[str] = ...) -> None: ...

class ExtendResponse(_message.Message):
    __slots__ = ("keep", "blocks", "copies")
    KEEP_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    keep: int
    blocks: bytes
    copies: _containers.RepeatedCompositeFieldContainer[Copy]
    def __init__(self, keep: _Optional[int] = ..., blocks: _Optional[bytes] = ..., copies: _Optional[_Iterable[_Union[Copy, _Mapping]]] = ...) -> None: ...

class ForkRequest(_message.Message):
    __slots__ = ("worker_key", "lease", "count", "shared_table", "request_id")
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SHARED_TABLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    worker_key: str
    lease: int
    count: int
    shared_table: bool
    request_id: str
    def __init__(self, worker_key: _Optional[str] = ..., lease: _Optional[int] = ..., count: _Optional[int] = ..., shared_table: _Optional[bool] = ..., request_id: _Optional[str] = ...) -> None: ...

class ForkResponse(_message.Message):
    __slots__ = ("children", "shared_table")
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    SHARED_TABLE_FIELD_NUMBER: _ClassVar[int]
    children: _containers.RepeatedCompositeFieldContainer[Grant]
    shared_table: bytes
    def __init__(self, children: _Optional[_Iterable[_Union[Grant, _Mapping]]] = ..., shared_table: _Optional[bytes] = ...) -> None: ...

class TruncateRequest(_message.Message):
    __slots__ = ("worker_key", "lease", "num_tokens", "request_id")
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    worker_key: str
    lease: int
    num_tokens: int
    request_id: str
    def __init__(self, worker_key: _Optional[str] = ..., lease: _Optional[int] = ..., num_tokens: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class TruncateResponse(_message.Message):
    __slots__ = ("keep", "blocks", "copies")
    KEEP_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    keep: int
    blocks: bytes
    copies: _containers.RepeatedCompositeFieldContainer[Copy]
    def __init__(self, keep: _Optional[int] = ..., blocks: _Optional[bytes] = ..., copies: _Optional[_Iterable[_Union[Copy, _Mapping]]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("worker_key", "lease", "request_id")
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    worker_key: str
    lease: int
    request_id: str
    def __init__(self, worker_key: _Optional[str] = ..., lease: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("num_freed",)
    NUM_FREED_FIELD_NUMBER: _ClassVar[int]
    num_freed: int
    def __init__(self, num_freed: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("worker_key", "in_hand", "stalled_s", "untaken", "oldest_untaken_s")
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    IN_HAND_FIELD_NUMBER: _ClassVar[int]
    STALLED_S_FIELD_NUMBER: _ClassVar[int]
    UNTAKEN_FIELD_NUMBER: _ClassVar[int]
    OLDEST_UNTAKEN_S_FIELD_NUMBER: _ClassVar[int]
    worker_key: str
    in_hand: int
    stalled_s: float
    untaken: int
    oldest_untaken_s: float
    def __init__(self, worker_key: _Optional[str] = ..., in_hand: _Optional[int] = ..., stalled_s: _Optional[float] = ..., untaken: _Optional[int] = ..., oldest_untaken_s: _Optional[float] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("num_in_line",)
    NUM_IN_LINE_FIELD_NUMBER: _ClassVar[int]
    num_in_line: int
    def __init__(self, num_in_line: _Optional[int] = ...) -> None: ...

class DetachRequest(_message.Message):
    __slots__ = ("worker_key",)
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    worker_key: str
    def __init__(self, worker_key: _Optional[str] = ...) -> None: ...

class DetachResponse(_message.Message):
    __slots__ = ("leases", "num_freed", "num_quarantined")
    LEASES_FIELD_NUMBER: _ClassVar[int]
    NUM_FREED_FIELD_NUMBER: _ClassVar[int]
    NUM_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedScalarFieldContainer[int]
    num_freed: int
    num_quarantined: int
    def __init__(self, leases: _Optional[_Iterable[int]] = ..., num_freed: _Optional[int] = ..., num_quarantined: _Optional[int] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("namespace", "worker_key", "namespace_index", "tokens")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    worker_key: str
    namespace_index: int
    tokens: bytes
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., worker_key: _Optional[str] = ..., namespace_index: _Optional[int] = ..., tokens: _Optional[bytes] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("num_tokens", "num_hit", "num_partial", "num_pending")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_HIT_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTIAL_FIELD_NUMBER: _ClassVar[int]
    NUM_PENDING_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    num_hit: int
    num_partial: int
    num_pending: int
    def __init__(self, num_tokens: _Optional[int] = ..., num_hit: _Optional[int] = ..., num_partial: _Optional[int] = ..., num_pending: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("namespace", "worker_key", "namespace_index", "tokens", "request_id")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    worker_key: str
    namespace_index: int
    tokens: bytes
    request_id: str
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., worker_key: _Optional[str] = ..., namespace_index: _Optional[int] = ..., tokens: _Optional[bytes] = ..., request_id: _Optional[str] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("start", "end", "fate")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    FATE_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    fate: Fate
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., fate: _Optional[_Union[Fate, str]] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("spans", "ledger", "parted_at", "stored_next", "num_parted", "resumes_at", "num_same", "extra_blocks", "num_pending", "elsewhere", "past", "num_below", "below_s", "below", "holding")
    SPANS_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    PARTED_AT_FIELD_NUMBER: _ClassVar[int]
    STORED_NEXT_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTED_FIELD_NUMBER: _ClassVar[int]
    RESUMES_AT_FIELD_NUMBER: _ClassVar[int]
    NUM_SAME_FIELD_NUMBER: _ClassVar[int]
    EXTRA_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PENDING_FIELD_NUMBER: _ClassVar[int]
    ELSEWHERE_FIELD_NUMBER: _ClassVar[int]
    PAST_FIELD_NUMBER: _ClassVar[int]
    NUM_BELOW_FIELD_NUMBER: _ClassVar[int]
    BELOW_S_FIELD_NUMBER: _ClassVar[int]
    BELOW_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    ledger: Ledger
    parted_at: int
    stored_next: bytes
    num_parted: int
    resumes_at: int
    num_same: int
    extra_blocks: int
    num_pending: int
    elsewhere: _containers.RepeatedCompositeFieldContainer[Elsewhere]
    past: PastRequest
    num_below: int
    below_s: float
    below: _containers.RepeatedCompositeFieldContainer[TierSpan]
    holding: HoldingInfo
    def __init__(self, spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., ledger: _Optional[_Union[Ledger, _Mapping]] = ..., parted_at: _Optional[int] = ..., stored_next: _Optional[bytes] = ..., num_parted: _Optional[int] = ..., resumes_at: _Optional[int] = ..., num_same: _Optional[int] = ..., extra_blocks: _Optional[int] = ..., num_pending: _Optional[int] = ..., elsewhere: _Optional[_Iterable[_Union[Elsewhere, _Mapping]]] = ..., past: _Optional[_Union[PastRequest, _Mapping]] = ..., num_below: _Optional[int] = ..., below_s: _Optional[float] = ..., below: _Optional[_Iterable[_Union[TierSpan, _Mapping]]] = ..., holding: _Optional[_Union[HoldingInfo, _Mapping]] = ...) -> None: ...

class TierSpan(_message.Message):
    __slots__ = ("tier", "start", "end", "fetch_s", "compute_s", "is_worth")
    TIER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    IS_WORTH_FIELD_NUMBER: _ClassVar[int]
    tier: str
    start: int
    end: int
    fetch_s: float
    compute_s: float
    is_worth: bool
    def __init__(self, tier: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., fetch_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., is_worth: _Optional[bool] = ...) -> None: ...

class Elsewhere(_message.Message):
    __slots__ = ("namespace", "num_tokens")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    num_tokens: int
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class PastRequest(_message.Message):
    __slots__ = ("request_id", "worker", "lease", "namespace", "age_s", "num_tokens", "tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    worker: str
    lease: int
    namespace: Namespace
    age_s: float
    num_tokens: int
    tokens: bytes
    def __init__(self, request_id: _Optional[str] = ..., worker: _Optional[str] = ..., lease: _Optional[int] = ..., namespace: _Optional[_Union[Namespace, _Mapping]] = ..., age_s: _Optional[float] = ..., num_tokens: _Optional[int] = ..., tokens: _Optional[bytes] = ...) -> None: ...

class ResetRequest(_message.Message):
    __slots__ = ("namespace", "worker_key", "namespace_index", "unnamed")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_INDEX_FIELD_NUMBER: _ClassVar[int]
    UNNAMED_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    worker_key: str
    namespace_index: int
    unnamed: bool
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., worker_key: _Optional[str] = ..., namespace_index: _Optional[int] = ..., unnamed: _Optional[bool] = ...) -> None: ...

class ResetResponse(_message.Message):
    __slots__ = ("num_blocks", "num_leased", "num_leases", "num_pins")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASED_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    NUM_PINS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    num_leased: int
    num_leases: int
    num_pins: int
    def __init__(self, num_blocks: _Optional[int] = ..., num_leased: _Optional[int] = ..., num_leases: _Optional[int] = ..., num_pins: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("namespace", "worker_key", "namespace_index", "tokens", "ttl_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    worker_key: str
    namespace_index: int
    tokens: bytes
    ttl_s: float
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., worker_key: _Optional[str] = ..., namespace_index: _Optional[int] = ..., tokens: _Optional[bytes] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("num_tokens", "num_blocks", "num_new", "num_leased", "ttl_s", "pinned", "max_pinned")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_NEW_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASED_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    MAX_PINNED_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    num_blocks: int
    num_new: int
    num_leased: int
    ttl_s: float
    pinned: int
    max_pinned: int
    def __init__(self, num_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_new: _Optional[int] = ..., num_leased: _Optional[int] = ..., ttl_s: _Optional[float] = ..., pinned: _Optional[int] = ..., max_pinned: _Optional[int] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("namespace", "worker_key", "namespace_index", "tokens")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    worker_key: str
    namespace_index: int
    tokens: bytes
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., worker_key: _Optional[str] = ..., namespace_index: _Optional[int] = ..., tokens: _Optional[bytes] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("num_pins", "num_blocks", "num_leased", "pinned", "max_pinned")
    NUM_PINS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASED_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    MAX_PINNED_FIELD_NUMBER: _ClassVar[int]
    num_pins: int
    num_blocks: int
    num_leased: int
    pinned: int
    max_pinned: int
    def __init__(self, num_pins: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_leased: _Optional[int] = ..., pinned: _Optional[int] = ..., max_pinned: _Optional[int] = ...) -> None: ...

class QuotaRequest(_message.Message):
    __slots__ = ("namespace", "tenant", "set", "max_held", "guaranteed")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SET_FIELD_NUMBER: _ClassVar[int]
    MAX_HELD_FIELD_NUMBER: _ClassVar[int]
    GUARANTEED_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    tenant: str
    set: bool
    max_held: int
    guaranteed: int
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., tenant: _Optional[str] = ..., set: _Optional[bool] = ..., max_held: _Optional[int] = ..., guaranteed: _Optional[int] = ...) -> None: ...

class QuotaResponse(_message.Message):
    __slots__ = ("quota",)
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    quota: QuotaInfo
    def __init__(self, quota: _Optional[_Union[QuotaInfo, _Mapping]] = ...) -> None: ...

class HoldingInfo(_message.Message):
    __slots__ = ("tenant", "host", "host_kept", "disk", "kept")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    HOST_KEPT_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    host: int
    host_kept: int
    disk: int
    kept: int
    def __init__(self, tenant: _Optional[str] = ..., host: _Optional[int] = ..., host_kept: _Optional[int] = ..., disk: _Optional[int] = ..., kept: _Optional[int] = ...) -> None: ...

class QuotaInfo(_message.Message):
    __slots__ = ("tenant", "namespace", "max_held", "guaranteed", "num_held", "num_stored")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    MAX_HELD_FIELD_NUMBER: _ClassVar[int]
    GUARANTEED_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_FIELD_NUMBER: _ClassVar[int]
    NUM_STORED_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    namespace: Namespace
    max_held: int
    guaranteed: int
    num_held: int
    num_stored: int
    def __init__(self, tenant: _Optional[str] = ..., namespace: _Optional[_Union[Namespace, _Mapping]] = ..., max_held: _Optional[int] = ..., guaranteed: _Optional[int] = ..., num_held: _Optional[int] = ..., num_stored: _Optional[int] = ...) -> None: ...

class PinInfo(_message.Message):
    __slots__ = ("namespace", "num_tokens", "num_blocks", "expires_in_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    num_tokens: int
    num_blocks: int
    expires_in_s: float
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., num_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., expires_in_s: _Optional[float] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaseInfo(_message.Message):
    __slots__ = ("lease", "worker", "namespace", "num_tokens", "num_committed", "num_blocks", "expires_in_s")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    lease: int
    worker: str
    namespace: Namespace
    num_tokens: int
    num_committed: int
    num_blocks: int
    expires_in_s: float
    def __init__(self, lease: _Optional[int] = ..., worker: _Optional[str] = ..., namespace: _Optional[_Union[Namespace, _Mapping]] = ..., num_tokens: _Optional[int] = ..., num_committed: _Optional[int] = ..., num_blocks: _Optional[int] = ..., expires_in_s: _Optional[float] = ...) -> None: ...

class NamespaceLedger(_message.Message):
    __slots__ = ("namespace", "ledger")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    ledger: Ledger
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., ledger: _Optional[_Union[Ledger, _Mapping]] = ...) -> None: ...

class StateInfo(_message.Message):
    __slots__ = ("folder", "failure", "restored_blocks", "restored_tokens", "damaged_blocks", "restore_s", "written_blocks", "dropped_runs", "pending_bytes")
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    RESTORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESTORE_S_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_RUNS_FIELD_NUMBER: _ClassVar[int]
    PENDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    folder: str
    failure: str
    restored_blocks: int
    restored_tokens: int
    damaged_blocks: int
    restore_s: float
    written_blocks: int
    dropped_runs: int
    pending_bytes: int
    def __init__(self, folder: _Optional[str] = ..., failure: _Optional[str] = ..., restored_blocks: _Optional[int] = ..., restored_tokens: _Optional[int] = ..., damaged_blocks: _Optional[int] = ..., restore_s: _Optional[float] = ..., written_blocks: _Optional[int] = ..., dropped_runs: _Optional[int] = ..., pending_bytes: _Optional[int] = ...) -> None: ...

class DiskInfo(_message.Message):
    __slots__ = ("folder", "cold", "found_blocks", "damaged_slots", "scan_s")
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    COLD_FIELD_NUMBER: _ClassVar[int]
    FOUND_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SCAN_S_FIELD_NUMBER: _ClassVar[int]
    folder: str
    cold: str
    found_blocks: int
    damaged_slots: int
    scan_s: float
    def __init__(self, folder: _Optional[str] = ..., cold: _Optional[str] = ..., found_blocks: _Optional[int] = ..., damaged_slots: _Optional[int] = ..., scan_s: _Optional[float] = ...) -> None: ...

class Shortage(_message.Message):
    __slots__ = ("extra_blocks", "tokens")
    EXTRA_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    extra_blocks: int
    tokens: int
    def __init__(self, extra_blocks: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class ServiceInfo(_message.Message):
    __slots__ = ("version", "pid", "uptime_s", "listening", "pool", "memory_bytes", "policy", "partial", "ttl_s", "workers", "sessions", "draining", "core", "state", "failures", "disk")
    class FailuresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    LISTENING_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    CORE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    uptime_s: float
    listening: _containers.RepeatedScalarFieldContainer[str]
    pool: PoolHandle
    memory_bytes: int
    policy: str
    partial: PartialReuse
    ttl_s: float
    workers: int
    sessions: int
    draining: bool
    core: str
    state: StateInfo
    failures: _containers.ScalarMap[str, str]
    disk: DiskInfo
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., uptime_s: _Optional[float] = ..., listening: _Optional[_Iterable[str]] = ..., pool: _Optional[_Union[PoolHandle, _Mapping]] = ..., memory_bytes: _Optional[int] = ..., policy: _Optional[str] = ..., partial: _Optional[_Union[PartialReuse, str]] = ..., ttl_s: _Optional[float] = ..., workers: _Optional[int] = ..., sessions: _Optional[int] = ..., draining: _Optional[bool] = ..., core: _Optional[str] = ..., state: _Optional[_Union[StateInfo, _Mapping]] = ..., failures: _Optional[_Mapping[str, str]] = ..., disk: _Optional[_Union[DiskInfo, _Mapping]] = ...) -> None: ...

class VerbInfo(_message.Message):
    __slots__ = ("verb", "count", "refused", "per_s", "p50_s", "p99_s")
    VERB_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PER_S_FIELD_NUMBER: _ClassVar[int]
    P50_S_FIELD_NUMBER: _ClassVar[int]
    P99_S_FIELD_NUMBER: _ClassVar[int]
    verb: str
    count: int
    refused: int
    per_s: float
    p50_s: float
    p99_s: float
    def __init__(self, verb: _Optional[str] = ..., count: _Optional[int] = ..., refused: _Optional[int] = ..., per_s: _Optional[float] = ..., p50_s: _Optional[float] = ..., p99_s: _Optional[float] = ...) -> None: ...

class FlightInfo(_message.Message):
    __slots__ = ("lease", "worker", "namespace", "num_tokens", "num_committed", "num_waiting")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    lease: int
    worker: str
    namespace: Namespace
    num_tokens: int
    num_committed: int
    num_waiting: int
    def __init__(self, lease: _Optional[int] = ..., worker: _Optional[str] = ..., namespace: _Optional[_Union[Namespace, _Mapping]] = ..., num_tokens: _Optional[int] = ..., num_committed: _Optional[int] = ..., num_waiting: _Optional[int] = ...) -> None: ...

class ShadowSums(_message.Message):
    __slots__ = ("requests", "tokens", "reused", "actual", "refused")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    requests: int
    tokens: int
    reused: int
    actual: int
    refused: int
    def __init__(self, requests: _Optional[int] = ..., tokens: _Optional[int] = ..., reused: _Optional[int] = ..., actual: _Optional[int] = ..., refused: _Optional[int] = ...) -> None: ...

class ShadowInfo(_message.Message):
    __slots__ = ("name", "num_blocks", "block_size", "last_hour", "whole")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAST_HOUR_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_blocks: int
    block_size: int
    last_hour: ShadowSums
    whole: ShadowSums
    def __init__(self, name: _Optional[str] = ..., num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., last_hour: _Optional[_Union[ShadowSums, _Mapping]] = ..., whole: _Optional[_Union[ShadowSums, _Mapping]] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("worker", "pid", "state", "since_s", "leases", "has_session", "in_hand", "stalled_s", "untaken", "oldest_untaken_s", "uncommitted_s")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    HAS_SESSION_FIELD_NUMBER: _ClassVar[int]
    IN_HAND_FIELD_NUMBER: _ClassVar[int]
    STALLED_S_FIELD_NUMBER: _ClassVar[int]
    UNTAKEN_FIELD_NUMBER: _ClassVar[int]
    OLDEST_UNTAKEN_S_FIELD_NUMBER: _ClassVar[int]
    UNCOMMITTED_S_FIELD_NUMBER: _ClassVar[int]
    worker: str
    pid: int
    state: str
    since_s: float
    leases: int
    has_session: bool
    in_hand: int
    stalled_s: float
    untaken: int
    oldest_untaken_s: float
    uncommitted_s: float
    def __init__(self, worker: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., since_s: _Optional[float] = ..., leases: _Optional[int] = ..., has_session: _Optional[bool] = ..., in_hand: _Optional[int] = ..., stalled_s: _Optional[float] = ..., untaken: _Optional[int] = ..., oldest_untaken_s: _Optional[float] = ..., uncommitted_s: _Optional[float] = ...) -> None: ...

class SnapshotResponse(_message.Message):
    __slots__ = ("num_blocks", "block_size", "free", "private", "indexed", "quarantined", "evictable", "ghosts", "nodes", "leases", "waiting", "evicted", "requests", "ledger", "namespaces", "service", "pinned", "max_pinned", "pins", "quotas", "shortage", "verbs", "requests_per_s", "flights_saved", "eviction_age_s", "workers", "flights", "shadows", "shadow_dropped", "num_leases", "index_bytes", "history_bytes", "max_history_bytes", "num_flights", "num_namespaces", "leaving", "host_blocks", "host_used", "sunk", "restored", "spoilt", "declined_slow", "declined_busy", "declined_room", "host_advantage", "disk_blocks", "disk_used", "disk_written", "disk_restored", "disk_moved", "disk_advantage", "has_remote", "remote_stored", "remote_unstored", "remote_restored", "remote_wrong", "remote_late", "remote_advantage", "disk_found", "holdings")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FIELD_NUMBER: _ClassVar[int]
    INDEXED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    EVICTABLE_FIELD_NUMBER: _ClassVar[int]
    GHOSTS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    MAX_PINNED_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    QUOTAS_FIELD_NUMBER: _ClassVar[int]
    SHORTAGE_FIELD_NUMBER: _ClassVar[int]
    VERBS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_S_FIELD_NUMBER: _ClassVar[int]
    FLIGHTS_SAVED_FIELD_NUMBER: _ClassVar[int]
    EVICTION_AGE_S_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    FLIGHTS_FIELD_NUMBER: _ClassVar[int]
    SHADOWS_FIELD_NUMBER: _ClassVar[int]
    SHADOW_DROPPED_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    INDEX_BYTES_FIELD_NUMBER: _ClassVar[int]
    HISTORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_HISTORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_FLIGHTS_FIELD_NUMBER: _ClassVar[int]
    NUM_NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_USED_FIELD_NUMBER: _ClassVar[int]
    SUNK_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    SPOILT_FIELD_NUMBER: _ClassVar[int]
    DECLINED_SLOW_FIELD_NUMBER: _ClassVar[int]
    DECLINED_BUSY_FIELD_NUMBER: _ClassVar[int]
    DECLINED_ROOM_FIELD_NUMBER: _ClassVar[int]
    HOST_ADVANTAGE_FIELD_NUMBER: _ClassVar[int]
    DISK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DISK_USED_FIELD_NUMBER: _ClassVar[int]
    DISK_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    DISK_RESTORED_FIELD_NUMBER: _ClassVar[int]
    DISK_MOVED_FIELD_NUMBER: _ClassVar[int]
    DISK_ADVANTAGE_FIELD_NUMBER: _ClassVar[int]
    HAS_REMOTE_FIELD_NUMBER: _ClassVar[int]
    REMOTE_STORED_FIELD_NUMBER: _ClassVar[int]
    REMOTE_UNSTORED_FIELD_NUMBER: _ClassVar[int]
    REMOTE_RESTORED_FIELD_NUMBER: _ClassVar[int]
    REMOTE_WRONG_FIELD_NUMBER: _ClassVar[int]
    REMOTE_LATE_FIELD_NUMBER: _ClassVar[int]
    REMOTE_ADVANTAGE_FIELD_NUMBER: _ClassVar[int]
    DISK_FOUND_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    block_size: int
    free: int
    private: int
    indexed: int
    quarantined: int
    evictable: int
    ghosts: int
    nodes: int
    leases: _containers.RepeatedCompositeFieldContainer[LeaseInfo]
    waiting: int
    evicted: int
    requests: int
    ledger: Ledger
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceLedger]
    service: ServiceInfo
    pinned: int
    max_pinned: int
    pins: _containers.RepeatedCompositeFieldContainer[PinInfo]
    quotas: _containers.RepeatedCompositeFieldContainer[QuotaInfo]
    shortage: _containers.RepeatedCompositeFieldContainer[Shortage]
    verbs: _containers.RepeatedCompositeFieldContainer[VerbInfo]
    requests_per_s: float
    flights_saved: int
    eviction_age_s: float
    workers: _containers.RepeatedCompositeFieldContainer[WorkerInfo]
    flights: _containers.RepeatedCompositeFieldContainer[FlightInfo]
    shadows: _containers.RepeatedCompositeFieldContainer[ShadowInfo]
    shadow_dropped: int
    num_leases: int
    index_bytes: int
    history_bytes: int
    max_history_bytes: int
    num_flights: int
    num_namespaces: int
    leaving: int
    host_blocks: int
    host_used: int
    sunk: int
    restored: int
    spoilt: int
    declined_slow: int
    declined_busy: int
    declined_room: int
    host_advantage: float
    disk_blocks: int
    disk_used: int
    disk_written: int
    disk_restored: int
    disk_moved: int
    disk_advantage: float
    has_remote: bool
    remote_stored: int
    remote_unstored: int
    remote_restored: int
    remote_wrong: int
    remote_late: int
    remote_advantage: float
    disk_found: int
    holdings: _containers.RepeatedCompositeFieldContainer[HoldingInfo]
    def __init__(self, num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., free: _Optional[int] = ..., private: _Optional[int] = ..., indexed: _Optional[int] = ..., quarantined: _Optional[int] = ..., evictable: _Optional[int] = ..., ghosts: _Optional[int] = ..., nodes: _Optional[int] = ..., leases: _Optional[_Iterable[_Union[LeaseInfo, _Mapping]]] = ..., waiting: _Optional[int] = ..., evicted: _Optional[int] = ..., requests: _Optional[int] = ..., ledger: _Optional[_Union[Ledger, _Mapping]] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceLedger, _Mapping]]] = ..., service: _Optional[_Union[ServiceInfo, _Mapping]] = ..., pinned: _Optional[int] = ..., max_pinned: _Optional[int] = ..., pins: _Optional[_Iterable[_Union[PinInfo, _Mapping]]] = ..., quotas: _Optional[_Iterable[_Union[QuotaInfo, _Mapping]]] = ..., shortage: _Optional[_Iterable[_Union[Shortage, _Mapping]]] = ..., verbs: _Optional[_Iterable[_Union[VerbInfo, _Mapping]]] = ..., requests_per_s: _Optional[float] = ..., flights_saved: _Optional[int] = ..., eviction_age_s: _Optional[float] = ..., workers: _Optional[_Iterable[_Union[WorkerInfo, _Mapping]]] = ..., flights: _Optional[_Iterable[_Union[FlightInfo, _Mapping]]] = ..., shadows: _Optional[_Iterable[_Union[ShadowInfo, _Mapping]]] = ..., shadow_dropped: _Optional[int] = ..., num_leases: _Optional[int] = ..., index_bytes: _Optional[int] = ..., history_bytes: _Optional[int] = ..., max_history_bytes: _Optional[int] = ..., num_flights: _Optional[int] = ..., num_namespaces: _Optional[int] = ..., leaving: _Optional[int] = ..., host_blocks: _Optional[int] = ..., host_used: _Optional[int] = ..., sunk: _Optional[int] = ..., restored: _Optional[int] = ..., spoilt: _Optional[int] = ..., declined_slow: _Optional[int] = ..., declined_busy: _Optional[int] = ..., declined_room: _Optional[int] = ..., host_advantage: _Optional[float] = ..., disk_blocks: _Optional[int] = ..., disk_used: _Optional[int] = ..., disk_written: _Optional[int] = ..., disk_restored: _Optional[int] = ..., disk_moved: _Optional[int] = ..., disk_advantage: _Optional[float] = ..., has_remote: _Optional[bool] = ..., remote_stored: _Optional[int] = ..., remote_unstored: _Optional[int] = ..., remote_restored: _Optional[int] = ..., remote_wrong: _Optional[int] = ..., remote_late: _Optional[int] = ..., remote_advantage: _Optional[float] = ..., disk_found: _Optional[int] = ..., holdings: _Optional[_Iterable[_Union[HoldingInfo, _Mapping]]] = ...) -> None: ...

class TreeRequest(_message.Message):
    __slots__ = ("namespace", "worker_key", "max_branches", "max_depth", "order", "without_ghosts")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    WORKER_KEY_FIELD_NUMBER: _ClassVar[int]
    MAX_BRANCHES_FIELD_NUMBER: _ClassVar[int]
    MAX_DEPTH_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_GHOSTS_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    worker_key: str
    max_branches: int
    max_depth: int
    order: TreeOrder
    without_ghosts: bool
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., worker_key: _Optional[str] = ..., max_branches: _Optional[int] = ..., max_depth: _Optional[int] = ..., order: _Optional[_Union[TreeOrder, str]] = ..., without_ghosts: _Optional[bool] = ...) -> None: ...

class Extent(_message.Message):
    __slots__ = ("runs", "blocks", "tokens", "ghost_tokens")
    RUNS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    GHOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    runs: int
    blocks: int
    tokens: int
    ghost_tokens: int
    def __init__(self, runs: _Optional[int] = ..., blocks: _Optional[int] = ..., tokens: _Optional[int] = ..., ghost_tokens: _Optional[int] = ...) -> None: ...

class Branch(_message.Message):
    __slots__ = ("depth", "start", "num_tokens", "num_blocks", "tokens", "below", "more", "num_more", "num_locks", "is_ghost", "is_pinned", "idle_s", "heat", "num_uses", "parted_at", "num_parted")
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BELOW_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    NUM_MORE_FIELD_NUMBER: _ClassVar[int]
    NUM_LOCKS_FIELD_NUMBER: _ClassVar[int]
    IS_GHOST_FIELD_NUMBER: _ClassVar[int]
    IS_PINNED_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    HEAT_FIELD_NUMBER: _ClassVar[int]
    NUM_USES_FIELD_NUMBER: _ClassVar[int]
    PARTED_AT_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTED_FIELD_NUMBER: _ClassVar[int]
    depth: int
    start: int
    num_tokens: int
    num_blocks: int
    tokens: bytes
    below: Extent
    more: Extent
    num_more: int
    num_locks: int
    is_ghost: bool
    is_pinned: bool
    idle_s: float
    heat: float
    num_uses: int
    parted_at: int
    num_parted: int
    def __init__(self, depth: _Optional[int] = ..., start: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., tokens: _Optional[bytes] = ..., below: _Optional[_Union[Extent, _Mapping]] = ..., more: _Optional[_Union[Extent, _Mapping]] = ..., num_more: _Optional[int] = ..., num_locks: _Optional[int] = ..., is_ghost: _Optional[bool] = ..., is_pinned: _Optional[bool] = ..., idle_s: _Optional[float] = ..., heat: _Optional[float] = ..., num_uses: _Optional[int] = ..., parted_at: _Optional[int] = ..., num_parted: _Optional[int] = ...) -> None: ...

class NamespaceTree(_message.Message):
    __slots__ = ("namespace", "branches")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BRANCHES_FIELD_NUMBER: _ClassVar[int]
    namespace: Namespace
    branches: _containers.RepeatedCompositeFieldContainer[Branch]
    def __init__(self, namespace: _Optional[_Union[Namespace, _Mapping]] = ..., branches: _Optional[_Iterable[_Union[Branch, _Mapping]]] = ...) -> None: ...

class TreeResponse(_message.Message):
    __slots__ = ("block_size", "namespaces", "num_moved", "num_more", "more")
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    NUM_MOVED_FIELD_NUMBER: _ClassVar[int]
    NUM_MORE_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    block_size: int
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceTree]
    num_moved: int
    num_more: int
    more: Extent
    def __init__(self, block_size: _Optional[int] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceTree, _Mapping]]] = ..., num_moved: _Optional[int] = ..., num_more: _Optional[int] = ..., more: _Optional[_Union[Extent, _Mapping]] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("max_runs",)
    MAX_RUNS_FIELD_NUMBER: _ClassVar[int]
    max_runs: int
    def __init__(self, max_runs: _Optional[int] = ...) -> None: ...

class CheckResponse(_message.Message):
    __slots__ = ("failure", "runs", "seconds", "left_out")
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    failure: str
    runs: int
    seconds: float
    left_out: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, failure: _Optional[str] = ..., runs: _Optional[int] = ..., seconds: _Optional[float] = ..., left_out: _Optional[_Iterable[str]] = ...) -> None: ...

class Op(_message.Message):
    __slots__ = ("id", "attach", "acquire", "cancel", "commit", "extend", "fork", "truncate", "release", "renew", "detach", "lookup", "explain", "reset", "snapshot", "pin", "unpin", "quota")
    ID_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    ACQUIRE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    EXTEND_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    UNPIN_FIELD_NUMBER: _ClassVar[int]
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    id: int
    attach: AttachRequest
    acquire: AcquireRequest
    cancel: CancelRequest
    commit: CommitRequest
    extend: ExtendRequest
    fork: ForkRequest
    truncate: TruncateRequest
    release: ReleaseRequest
    renew: RenewRequest
    detach: DetachRequest
    lookup: LookupRequest
    explain: ExplainRequest
    reset: ResetRequest
    snapshot: SnapshotRequest
    pin: PinRequest
    unpin: UnpinRequest
    quota: QuotaRequest
    def __init__(self, id: _Optional[int] = ..., attach: _Optional[_Union[AttachRequest, _Mapping]] = ..., acquire: _Optional[_Union[AcquireRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ..., commit: _Optional[_Union[CommitRequest, _Mapping]] = ..., extend: _Optional[_Union[ExtendRequest, _Mapping]] = ..., fork: _Optional[_Union[ForkRequest, _Mapping]] = ..., truncate: _Optional[_Union[TruncateRequest, _Mapping]] = ..., release: _Optional[_Union[ReleaseRequest, _Mapping]] = ..., renew: _Optional[_Union[RenewRequest, _Mapping]] = ..., detach: _Optional[_Union[DetachRequest, _Mapping]] = ..., lookup: _Optional[_Union[LookupRequest, _Mapping]] = ..., explain: _Optional[_Union[ExplainRequest, _Mapping]] = ..., reset: _Optional[_Union[ResetRequest, _Mapping]] = ..., snapshot: _Optional[_Union[SnapshotRequest, _Mapping]] = ..., pin: _Optional[_Union[PinRequest, _Mapping]] = ..., unpin: _Optional[_Union[UnpinRequest, _Mapping]] = ..., quota: _Optional[_Union[QuotaRequest, _Mapping]] = ...) -> None: ...

class OpBatch(_message.Message):
    __slots__ = ("ops",)
    OPS_FIELD_NUMBER: _ClassVar[int]
    ops: _containers.RepeatedCompositeFieldContainer[Op]
    def __init__(self, ops: _Optional[_Iterable[_Union[Op, _Mapping]]] = ...) -> None: ...

class OpResult(_message.Message):
    __slots__ = ("id", "error", "attach", "acquire", "cancel", "commit", "extend", "fork", "truncate", "release", "renew", "detach", "lookup", "explain", "reset", "snapshot", "pin", "unpin", "quota")
    ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    ACQUIRE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    EXTEND_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    UNPIN_FIELD_NUMBER: _ClassVar[int]
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    id: int
    error: Status
    attach: AttachResponse
    acquire: AcquireResponse
    cancel: CancelResponse
    commit: CommitResponse
    extend: ExtendResponse
    fork: ForkResponse
    truncate: TruncateResponse
    release: ReleaseResponse
    renew: RenewResponse
    detach: DetachResponse
    lookup: LookupResponse
    explain: ExplainResponse
    reset: ResetResponse
    snapshot: SnapshotResponse
    pin: PinResponse
    unpin: UnpinResponse
    quota: QuotaResponse
    def __init__(self, id: _Optional[int] = ..., error: _Optional[_Union[Status, _Mapping]] = ..., attach: _Optional[_Union[AttachResponse, _Mapping]] = ..., acquire: _Optional[_Union[AcquireResponse, _Mapping]] = ..., cancel: _Optional[_Union[CancelResponse, _Mapping]] = ..., commit: _Optional[_Union[CommitResponse, _Mapping]] = ..., extend: _Optional[_Union[ExtendResponse, _Mapping]] = ..., fork: _Optional[_Union[ForkResponse, _Mapping]] = ..., truncate: _Optional[_Union[TruncateResponse, _Mapping]] = ..., release: _Optional[_Union[ReleaseResponse, _Mapping]] = ..., renew: _Optional[_Union[RenewResponse, _Mapping]] = ..., detach: _Optional[_Union[DetachResponse, _Mapping]] = ..., lookup: _Optional[_Union[LookupResponse, _Mapping]] = ..., explain: _Optional[_Union[ExplainResponse, _Mapping]] = ..., reset: _Optional[_Union[ResetResponse, _Mapping]] = ..., snapshot: _Optional[_Union[SnapshotResponse, _Mapping]] = ..., pin: _Optional[_Union[PinResponse, _Mapping]] = ..., unpin: _Optional[_Union[UnpinResponse, _Mapping]] = ..., quota: _Optional[_Union[QuotaResponse, _Mapping]] = ...) -> None: ...

class OpResults(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[OpResult]
    def __init__(self, results: _Optional[_Iterable[_Union[OpResult, _Mapping]]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("from_sequence", "namespace", "tokens")
    FROM_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    from_sequence: int
    namespace: Namespace
    tokens: bool
    def __init__(self, from_sequence: _Optional[int] = ..., namespace: _Optional[_Union[Namespace, _Mapping]] = ..., tokens: _Optional[bool] = ...) -> None: ...

class BlockStored(_message.Message):
    __slots__ = ("block_hashes", "parent_block_hash", "block_size", "token_ids", "medium")
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    PARENT_BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    parent_block_hash: bytes
    block_size: int
    token_ids: bytes
    medium: str
    def __init__(self, block_hashes: _Optional[_Iterable[bytes]] = ..., parent_block_hash: _Optional[bytes] = ..., block_size: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., medium: _Optional[str] = ...) -> None: ...

class BlockRemoved(_message.Message):
    __slots__ = ("block_hashes", "medium")
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    block_hashes: _containers.RepeatedScalarFieldContainer[bytes]
    medium: str
    def __init__(self, block_hashes: _Optional[_Iterable[bytes]] = ..., medium: _Optional[str] = ...) -> None: ...

class AllBlocksCleared(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CacheEvent(_message.Message):
    __slots__ = ("sequence", "at", "namespace", "stored", "removed", "cleared")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    at: float
    namespace: Namespace
    stored: BlockStored
    removed: BlockRemoved
    cleared: AllBlocksCleared
    def __init__(self, sequence: _Optional[int] = ..., at: _Optional[float] = ..., namespace: _Optional[_Union[Namespace, _Mapping]] = ..., stored: _Optional[_Union[BlockStored, _Mapping]] = ..., removed: _Optional[_Union[BlockRemoved, _Mapping]] = ..., cleared: _Optional[_Union[AllBlocksCleared, _Mapping]] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("events", "next_sequence", "is_snapshot", "gap", "gap_from")
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    IS_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    GAP_FIELD_NUMBER: _ClassVar[int]
    GAP_FROM_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[CacheEvent]
    next_sequence: int
    is_snapshot: bool
    gap: bool
    gap_from: int
    def __init__(self, events: _Optional[_Iterable[_Union[CacheEvent, _Mapping]]] = ..., next_sequence: _Optional[int] = ..., is_snapshot: _Optional[bool] = ..., gap: _Optional[bool] = ..., gap_from: _Optional[int] = ...) -> None: ...
