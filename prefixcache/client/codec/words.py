"""The words that answers are made of: namespaces, layouts, pools, ledgers, copies."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Callable, Iterable
from dataclasses import fields
from hashlib import blake2b
from typing import Any, ClassVar, Final, Protocol, TypeVar

from prefixcache import errors
from prefixcache.types import (
    Again,
    BlockId,
    Copy,
    Layout,
    Ledger,
    Namespace,
    Partial,
    PoolHandle,
    Segment,
)
from prefixcache.v1 import prefixcache_pb2 as pb


class Plain(Protocol):
    """An answer that is a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=Plain)

DTYPES: Final = {
    "bfloat16": pb.ELEMENT_TYPE_BFLOAT16,
    "float16": pb.ELEMENT_TYPE_FLOAT16,
    "float32": pb.ELEMENT_TYPE_FLOAT32,
    "float8_e4m3fn": pb.ELEMENT_TYPE_FLOAT8_E4M3FN,
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
_DTYPE_NAMES = {number: name for name, number in DTYPES.items()}
_POOL_KIND_NAMES = {number: name for name, number in POOL_KINDS.items()}


_SEAL_KEY: Final = secrets.token_bytes(32)


def write_namespace(word: Namespace, message: pb.Namespace) -> None:
    """Fill `message`."""
    message.model = word.model
    message.adapter = word.adapter
    message.tenant = word.tenant
    message.salt = word.salt
    if word.approximate:
        message.approximate = True


def show_namespace(word: Namespace, message: pb.Namespace) -> None:
    """Fill `message` of an answer: a salt is a secret, so another text stands in its place."""
    write_namespace(word, message)
    message.salt = seal(word.salt)


def seal(salt: str) -> str:
    """Give what is shown in place of a salt: the same for the same one while this process lives.

    It tells two namespaces apart, and nothing about either salt.
    """
    if not salt:
        return ""
    return f"sealed-{blake2b(salt.encode(), key=_SEAL_KEY, digest_size=8).hexdigest()}"


def read_namespace(message: pb.Namespace) -> Namespace:
    """Read the namespace that a request names.

    Raises:
        InvalidRequest: it is one that nobody can name.
    """
    if message.approximate:
        raise errors.InvalidRequest(
            "an approximate namespace is not named: ask for segments in the exact one beside it"
        )
    return Namespace(message.model, message.adapter, message.tenant, message.salt)


def read_shown_namespace(message: pb.Namespace) -> Namespace:
    """Read a namespace of an answer, as `show_namespace` wrote it."""
    return Namespace(
        message.model, message.adapter, message.tenant, message.salt, message.approximate
    )


def write_layout(word: Layout, message: pb.Layout) -> None:
    """Fill `message`.

    Raises:
        InvalidRequest: the element type cannot be held by a pool, or a number is out of range.
    """
    if not word.is_ours:
        message.planes = word.planes
        message.page_bytes = word.page_bytes
        message.format = word.format
        return
    if word.dtype not in DTYPES:
        raise errors.InvalidRequest(
            f"a pool cannot hold {word.dtype!r}; it can hold {', '.join(DTYPES)}"
        )
    message.num_layers = word.num_layers
    message.num_kv_heads = word.num_kv_heads
    message.head_dim = word.head_dim
    message.dtype = DTYPES[word.dtype]


def read_layout(message: pb.Layout) -> Layout:
    """Read what `write_layout` wrote; a type that this version does not know reads as `""`.

    Raises:
        InvalidRequest: it is no layout, or two.
    """
    layout = Layout(
        message.num_layers,
        message.num_kv_heads,
        message.head_dim,
        _DTYPE_NAMES.get(message.dtype, ""),
        planes=message.planes,
        page_bytes=message.page_bytes,
        format=message.format,
    )
    if message.dtype and not layout.is_ours:
        raise errors.InvalidRequest(
            f"{layout} has an element type beside the name of its format: only the format says "
            "what is in its pages"
        )
    return layout


def write_pool(word: PoolHandle, message: pb.PoolHandle) -> None:
    """Fill `message`."""
    message.kind = POOL_KINDS[word.kind]
    message.name = word.name
    message.num_blocks = word.num_blocks
    message.block_size = word.block_size
    write_layout(word.layout, message.layout)
    message.epoch = word.epoch
    message.offset = word.offset
    message.first_block = word.first_block


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
        message.first_block,
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
    if word.resumed:
        message.resumed = word.resumed
    if word.approximate:
        message.approximate = word.approximate
    if word.restored:
        message.restored = word.restored


def read_ledger(message: pb.Ledger) -> Ledger:
    """Read what `write_ledger` wrote."""
    return Ledger(
        message.hit,
        message.partial,
        message.joined,
        message.cold,
        message.evicted,
        message.granularity,
        message.resumed,
        message.approximate,
        message.restored,
    )


def write_copies(copies: tuple[Copy, ...], messages: Any) -> None:
    """Add to `messages`."""
    for copy in copies:
        messages.add(src=copy.src, dst=copy.dst, num_tokens=copy.num_tokens)


def read_copies(messages: Iterable[pb.Copy]) -> tuple[Copy, ...]:
    """Read what `write_copies` wrote."""
    return tuple([Copy(BlockId(m.src), BlockId(m.dst), m.num_tokens) for m in messages])


def write_again(word: Again, message: pb.Again) -> None:
    """Fill `message`.

    Raises:
        InvalidRequest: a number is out of range.
    """
    message.SetInParent()
    message.first, message.share = word.first, word.share


def read_again(message: pb.Again) -> Again:
    """Read what `write_again` wrote."""
    return Again(message.first, message.share)


def write_segments(segments: tuple[Segment, ...], messages: Any) -> None:
    """Add to `messages`."""
    for one in segments:
        messages.add(
            start=one.start,
            source=one.source,
            blocks=one.blocks.tobytes(),
            num_again=one.num_again,
        )


def read_segments(messages: Iterable[pb.Segment]) -> tuple[Segment, ...]:
    """Read what `write_segments` wrote."""
    return tuple([Segment(m.start, m.source, array("i", m.blocks), m.num_again) for m in messages])


def write_fields(answer: Plain, message: Any) -> None:
    """Fill `message`, whose fields are numbers, all of them, with the names of the answer's."""
    message.SetInParent()
    for name in answer.__dataclass_fields__:
        setattr(message, name, getattr(answer, name))


def read_fields(kind: type[T]) -> Callable[[Any], T]:
    """Make the function that reads an answer of that kind, as `write_fields` wrote it."""
    names = [field.name for field in fields(kind)]

    def read(message: Any) -> T:
        return kind(**{name: getattr(message, name) for name in names})

    return read
