"""What the operations refuse, on a CPU and on a GPU alike: one gate in front of C, Triton, PyTorch.

Behind it an address is that of memory that the kernels can read, of the type that they take it for.
It says what is taken, not what is not: PyTorch has a dozen kinds of tensors without memory of their
own, or whose memory does not say what they are, and the next version will have more.
What lies in small tensors, lengths and ids of blocks and slots, is looked at on a CPU always (in
Triton's interpreter too).  On a GPU that would wait for the device: there it is trusted, unless
`PREFIXCACHE_CHECK=1` asks for it, and a kernel skips slots outside the pool.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache.types import shown

FP8: Final = torch.float8_e4m3fn
"""The one eight-bit type that caches may have: 4 bits of exponent, 3 of mantissa, at most 448."""

NUMBERS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What queries, keys and values may be, beside eight-bit caches."""

INTEGERS: Final = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
"""What tables and lengths may be on a CPU; on a GPU they are int32."""

LARGEST: Final = 1e30
"""Bound of `scale` and `softcap`: with it, sums and quotients stay numbers in float32."""

LONGEST: Final = 2**31 - 1
"""Tokens that a window or a distance has at most: what an int32 holds."""

VALUES_CHECKED: Final = os.environ.get("PREFIXCACHE_CHECK", "0") not in ("", "0")
"""Whether tables, lengths and slots on a GPU are looked at, which waits for the device."""


_PLAIN: Final = (Tensor, torch.nn.Parameter)
"""What is no subclass that may be anything; each has the memory that it speaks of."""


def check_tensors(**tensors: Any) -> None:
    """Refuse all but plain tensors, whose numbers lie in memory as shape and strides say.

    Refused are lists and arrays, subclasses, sparse, nested and quantized tensors, lazily negated
    ones, those of transforms (`vmap`, `grad`) and tracers, and such as have no memory, or lost it.

    Raises:
        InvalidRequest: As said, naming the argument.
    """
    for name, given in tensors.items():
        if not is_plain(given):
            raise InvalidRequest(f"{name} {_flaw(given)}")


def is_plain(given: Any) -> bool:
    """Tell whether this is a tensor whose numbers lie in memory as shape and strides say."""
    return _place(given) is not None


def _place(given: Any) -> tuple[int, int] | None:
    """Give the address of a tensor's first number and the one after its last; None: not plain."""
    if type(given) not in _PLAIN or given.is_neg() or given.is_nested:
        return None
    try:
        taken = given.nbytes if given.is_contiguous() else _span(given) * given.itemsize
        begin, held = given.data_ptr(), given.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # there is no storage, or no strides
        return None
    before = given.storage_offset() * given.itemsize
    if taken and (begin == before or held < before + taken):  # the storage lies at 0, or is short
        return None
    if not taken and (given.is_meta or torch._is_functional_tensor(given)):
        return None
    return begin, begin + taken


def _flaw(given: Any) -> str:
    """Say why something is no plain tensor."""
    if type(given) not in _PLAIN:
        return f"is a {type(given).__name__}, not a torch.Tensor"
    if given.is_meta:
        return f"{list(given.shape)} lies nowhere: there is nothing in tensors on meta"
    if given.layout is not torch.strided or given.is_nested:
        return f"is {'nested' if given.is_nested else given.layout}: not plain memory"
    if given.is_neg():
        return f"of {given.dtype} is a lazy negation: not plain memory"
    return (
        f"{list(given.shape)} of {given.dtype} has not the memory for it: it was let go of, or the "
        "tensor stands for others in a transform"
    )


def _span(tensor: Tensor) -> int:
    """Give the elements from a tensor's first to its last, both included; 0 if it has none."""
    span = 1
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        if not size:
            return 0
        span += (size - 1) * step
    return span


def memory(tensor: Tensor) -> tuple[int, int]:
    """Give the address of a plain tensor's first number, and the one after its last.

    Raises:
        InvalidRequest: It is not plain.
    """
    place = _place(tensor)
    if place is None:
        raise InvalidRequest(f"a tensor {_flaw(tensor)}")
    return place


def check_scalars(scale: Any, window: Any, softcap: Any) -> tuple[float, int | None, float | None]:
    """Give them as plain numbers.

    Raises:
        InvalidRequest: One is no number, not finite, or out of bounds.

    >>> check_scalars(1, None, 30)
    (1.0, None, 30.0)
    """
    if type(scale) is float and window is None and softcap is None and -LARGEST <= scale <= LARGEST:
        return scale, None, None
    if type(scale) is not float:
        if not isinstance(scale, Real) or isinstance(scale, bool):
            raise InvalidRequest(f"scale is {shown(scale)}, not a number")
        scale = _real(scale)
    if not -LARGEST <= scale <= LARGEST:  # also not NaN
        raise InvalidRequest(f"scale is {scale:g}, not between -{LARGEST:g} and {LARGEST:g}")
    if window is not None:
        if not isinstance(window, Integral) or isinstance(window, bool):
            raise InvalidRequest(f"window is {shown(window)}, not an integer or None")
        window = int(window)
        if not 1 <= window <= LONGEST:
            raise InvalidRequest(f"a window of {shown(window)} tokens: not between 1 and {LONGEST}")
    if softcap is not None:
        if not isinstance(softcap, Real) or isinstance(softcap, bool):
            raise InvalidRequest(f"softcap is {shown(softcap)}, not a number or None")
        softcap = _real(softcap)
        if not 1 / LARGEST <= softcap <= LARGEST:
            raise InvalidRequest(
                f"softcap is {softcap:g}, not between {1 / LARGEST:g} and {LARGEST:g}; "
                "None is without a cap"
            )
    return scale, window, softcap


def _real(number: Real) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def check_step(block_tables: Tensor, query_start: Tensor, context_lens: Tensor) -> None:
    """Refuse tables and lengths of other shapes or types than a batch has.  Looks at no value.

    Raises:
        InvalidRequest: As said.
    """
    if not (
        block_tables.dim() == 2
        and query_start.dim() == context_lens.dim() == 1
        and block_tables.shape[0] == query_start.shape[0] - 1 == context_lens.shape[0]
    ):
        raise InvalidRequest(
            f"block_tables {list(block_tables.shape)}, query_start {list(query_start.shape)} and "
            f"context_lens {list(context_lens.shape)} are not [S, max_blocks], [S + 1] and [S]"
        )
    for name, given in (
        ("block_tables", block_tables),
        ("query_start", query_start),
        ("context_lens", context_lens),
    ):
        if given.dtype not in INTEGERS:
            raise InvalidRequest(f"{name} is {given.dtype}, not one of int32 or int64")


def check_values(
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    *,
    num_queries: int,
    num_blocks: int,
    block_size: int,
) -> None:
    """Refuse lengths that do not fit the queries, and blocks outside the pool.  O(table entries).

    On a GPU this waits for the device.

    Raises:
        InvalidRequest: As said.
    """
    tables, starts, contexts = (
        given.cpu().numpy().astype(np.int64) for given in (block_tables, query_start, context_lens)
    )
    lens, room = np.diff(starts), tables.shape[1] * block_size
    if starts[0] != 0 or starts[-1] != num_queries or (lens < 0).any():
        raise InvalidRequest(
            f"query_start does not rise from 0 to {num_queries}, the queries that are there: "
            f"{starts[:8].tolist()}"
        )
    wrong = np.flatnonzero((contexts < lens) | (contexts > room))
    if len(wrong):
        s = int(wrong[0])
        raise InvalidRequest(
            f"sequence {s} has {lens[s]} queries and {contexts[s]} keys (its own queries included) "
            f"in a table of {room} slots"
        )
    contexts = np.where(lens > 0, contexts, 0)  # of a sequence without queries nothing is read
    check_ids(tables[np.arange(tables.shape[1]) * block_size < contexts[:, None]], num_blocks)


def check_ids(ids: Any, num_blocks: int) -> None:
    """Refuse blocks outside the pool: a tensor or an array of ids.

    Raises:
        InvalidRequest: As said.
    """
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < num_blocks:
        raise InvalidRequest(
            f"block tables name blocks {int(ids.min())} to {int(ids.max())}; the pool has "
            f"{num_blocks}"
        )


def check_store(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Written:
    """Refuse what `store_kv` cannot write; give what it writes to.  Looks at no value.

    Raises:
        InvalidRequest: The tensors, their shapes, types or places do not fit together.
    """
    known = _known(key_cache, value_cache)
    places = _place(key), _place(value), _place(slot_mapping)
    if (
        known is not None
        and key_cache.is_cpu
        and places[0] is not None
        and places[1] is not None
        and places[2] is not None
        and key.dtype is value.dtype is known.dtype
        and key.is_cpu
        and value.is_cpu
        and slot_mapping.is_cpu
        and slot_mapping.dtype is torch.int64
        and slot_mapping.dim() == 1
        and key.shape == (slot_mapping.numel(), *known.key_tail)
        and value.shape == (slot_mapping.numel(), *known.value_tail)
        and key_scale is value_scale is None
        and known.dtype is not FP8
        and (places[0][0] >= known.high or places[0][1] <= known.low)
        and (places[1][0] >= known.high or places[1][1] <= known.low)
        and (places[2][0] >= known.high or places[2][1] <= known.low)
    ):
        return known  # as in almost every layer of every step
    check_tensors(
        key=key,
        value=value,
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=slot_mapping,
    )
    if (
        key.dim() != 3
        or value.dim() != 3
        or key_cache.dim() != 4
        or value_cache.dim() != 4
        or key_cache.shape[:3] != value_cache.shape[:3]
        or key.shape[:2] != value.shape[:2]
        or key.shape[1:] != key_cache.shape[2:]
        or value.shape[1:] != value_cache.shape[2:]
        or slot_mapping.shape != key.shape[:1]
        or not all(key_cache.shape[1:])
        or not value_cache.shape[3]
    ):
        raise InvalidRequest(
            f"key {list(key.shape)}, value {list(value.shape)} and slot_mapping "
            f"{list(slot_mapping.shape)} do not fit caches {list(key_cache.shape)} and "
            f"{list(value_cache.shape)}: [T, kv_heads, head_dim], [T] and "
            "[num_blocks, block_size, kv_heads, head_dim], none of 0"
        )
    same = key.dtype == value.dtype and key_cache.dtype == value_cache.dtype
    if not same or key_cache.dtype not in (key.dtype, FP8) or key.dtype not in NUMBERS:
        raise InvalidRequest(
            f"keys of {key.dtype} and values of {value.dtype} do not fit caches of "
            f"{key_cache.dtype} and {value_cache.dtype}"
        )
    check_scales(key_cache, key_scale, value_scale)
    if slot_mapping.dtype != torch.int64:
        raise InvalidRequest(f"slot_mapping is {slot_mapping.dtype}, not torch.int64")
    _check_together(
        key_cache,
        key=key,
        value=value,
        value_cache=value_cache,
        slot_mapping=slot_mapping,
        key_scale=key_scale,
        value_scale=value_scale,
    )
    if known is None:
        known = _look(key_cache, value_cache)
    for cache in (key_cache, value_cache):
        check_apart("the caches", cache, key=key, value=value, slot_mapping=slot_mapping)
        check_apart("the caches", cache, key_scale=key_scale, value_scale=value_scale)
    return known


def check_layers(
    key: Tensor,
    value: Tensor,
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    slot_mapping: Tensor,
    **read: Tensor,
) -> list[Written]:
    """Refuse what `store_kv` cannot write in one of a step's layers; give what it writes to.

    For caches that were seen before this takes a part of what `check_store` takes for each.  They
    are of one kind, so what is then looked at in the first layer's holds for all.

    Args:
        key: Of one layer, and so is `value`; of the others they are alike, and lie anywhere else.
        value: As of `check_store`.
        key_caches: Of each layer, at least one; plain tensors on a CPU.
        value_caches: As many.
        slot_mapping: As of `check_store`; it lies apart from all caches.
        read: What else lies apart from them, by name: plain tensors.

    Raises:
        InvalidRequest: As `check_store`, or shapes, strides or types differ from layer to layer.
    """
    first = check_store(key, value, key_caches[0], value_caches[0], slot_mapping)
    kind, dtype = first.kind[2:], first.dtype
    made = []
    for keys, values in zip(key_caches, value_caches, strict=True):
        known = _known(keys, values)
        if known is None or not keys.is_cpu:
            known = check_store(key, value, keys, values, slot_mapping)
        if known.kind[2:] != kind or known.dtype is not dtype:
            raise InvalidRequest(
                f"caches {list(keys.shape)} and {list(values.shape)} of {keys.dtype} with strides "
                f"{keys.stride()} and {values.stride()}: not of the first layer's kind"
            )
        made.append(known)
    # Almost always the caches are parts of one pool, and nothing else lies between them.
    low, high = min(known.low for known in made), max(known.high for known in made)
    read |= {"key": key, "value": value, "slot_mapping": slot_mapping}
    near = {}
    for name, tensor in read.items():
        begin, end = memory(tensor)
        if begin < high and low < end:
            near[name] = tensor
    if near:
        for cache in (*key_caches, *value_caches):
            check_apart("the caches", cache, **near)
    return made


def check_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """Refuse what `paged_attention` cannot compute.  Looks at no value.

    Raises:
        InvalidRequest: The tensors, their shapes, types or places do not fit together.
    """
    check_tensors(query=query, key_cache=key_cache, value_cache=value_cache)
    if (
        query.dim() != 3
        or key_cache.dim() != 4
        or value_cache.dim() != 4
        or key_cache.shape[:3] != value_cache.shape[:3]
        or query.shape[2] != key_cache.shape[3]
        or not all(key_cache.shape[1:])
        or not value_cache.shape[3]
        or not query.shape[1]
        or query.shape[1] % key_cache.shape[2]
    ):
        raise InvalidRequest(
            f"query {list(query.shape)} does not fit caches {list(key_cache.shape)} and "
            f"{list(value_cache.shape)}: [T, heads, head_dim] and "
            "[num_blocks, block_size, kv_heads, head_dim], heads a multiple of kv_heads, none of 0"
        )
    if (
        key_cache.dtype != value_cache.dtype
        or key_cache.dtype not in (query.dtype, FP8)
        or query.dtype not in NUMBERS
    ):
        raise InvalidRequest(
            f"queries of {query.dtype} do not fit caches of {key_cache.dtype} and "
            f"{value_cache.dtype}"
        )
    if sinks is not None:
        check_tensors(sinks=sinks)
        if sinks.shape != query.shape[1:2] or sinks.dtype not in NUMBERS:
            raise InvalidRequest(
                f"sinks {list(sinks.shape)} of {sinks.dtype} for {query.shape[1]} heads"
            )
    check_scales(key_cache, key_scale, value_scale)
    if lse is not None:
        check_tensors(lse=lse)
        if lse.shape != query.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous():
            raise InvalidRequest(
                f"lse {list(lse.shape)} of {lse.dtype}: not {list(query.shape[:2])} of "
                "torch.float32, contiguous"
            )
    _check_together(
        key_cache,
        query=query,
        value_cache=value_cache,
        sinks=sinks,
        key_scale=key_scale,
        value_scale=value_scale,
        lse=lse,
    )
    if lse is not None:
        check_written("lse", lse)
        check_apart("lse", lse, query=query, key_cache=key_cache, value_cache=value_cache)
        check_apart("lse", lse, sinks=sinks, key_scale=key_scale, value_scale=value_scale)


def check_scales(cache: Tensor, key_scale: Tensor | None, value_scale: Tensor | None) -> None:
    """Refuse scales for a cache that has none, and an eight-bit cache without them.

    Raises:
        InvalidRequest: As said, or scales that are not one float32 per head.
    """
    given = [scale for scale in (key_scale, value_scale) if scale is not None]
    if len(given) != (2 if cache.dtype == FP8 else 0):
        raise InvalidRequest(
            f"a cache of {cache.dtype} with {len(given)} scales: {FP8} caches take key_scale and "
            "value_scale, others none"
        )
    heads = cache.shape[2]
    for scale in given:
        check_tensors(scale=scale)
        if scale.shape != (heads,) or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise InvalidRequest(
                f"a scale {list(scale.shape)} of {scale.dtype}: not [{heads}] of torch.float32, "
                "contiguous, one factor per key head"
            )


def _check_together(where: Tensor, **others: Tensor | None) -> None:
    """Refuse tensors on several devices."""
    device = where.device
    if where.is_cpu and all(other is None or other.is_cpu for other in others.values()):
        return
    for name, other in others.items():
        if other is not None and other.device != device:
            raise InvalidRequest(f"{name} on {other.device}, the caches on {device}")


# ── what is written ───────────────────────────────────────────────────────────────────────────────

_PAGE: Final = mmap.PAGESIZE
_POPULATE_WRITE: Final = 23
"""`MADV_POPULATE_WRITE`, from Linux 5.14 on: make pages ready to be written, or say that they
cannot be.  Changes no byte."""


def check_written(name: str, tensor: Tensor) -> None:
    """Refuse to write where one number is several, or to memory that is mapped to be read alone.

    PyTorch's own memory can be written; of other memory (NumPy's, a file's) the kernel is asked,
    for its first and its last page.  Before Linux 5.14 it cannot be asked: then it is trusted.

    Raises:
        InvalidRequest: As said.
    """
    span = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step <= span:
            raise InvalidRequest(
                f"{name} {list(tensor.shape)} with strides {tensor.stride()}: an expanded tensor, "
                "or one that overlaps itself, cannot be written"
            )
        span += max(0, size - 1) * step
    if tensor.is_cpu and tensor.numel() and not tensor.untyped_storage().resizable():
        begin, end = memory(tensor)
        for page in {begin // _PAGE, (end - 1) // _PAGE}:
            if _madvise(page * _PAGE, _PAGE, _POPULATE_WRITE) and _asks_the_kernel():
                raise InvalidRequest(
                    f"{name} {list(tensor.shape)} cannot be written: its memory is mapped to be "
                    "read alone, or its file has no room"
                )


_madvise: Final = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _asks_the_kernel() -> bool:
    """Whether the kernel can be asked for memory to be written: tried on some that can be."""
    page = mmap.mmap(-1, _PAGE)
    here = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return bool(_madvise(here, _PAGE, _POPULATE_WRITE) == 0)


def check_apart(name: str, written: Tensor, **read: Tensor | None) -> None:
    """Refuse to read where is written at the same time: the outcome would depend on the order.

    Looks at the stretch of memory from each tensor's first number to its last.

    Raises:
        InvalidRequest: As said.
    """
    begin, end = memory(written)
    for other, tensor in read.items():
        if tensor is not None and tensor.device == written.device:
            first, last = memory(tensor)
            if first < end and begin < last:
                raise InvalidRequest(f"{other} lies in the memory of {name}, which is written")


def _share_numbers(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors have a number in common; or may have, for their strides differ."""
    (begin, end), (first, last) = memory(one), memory(other)
    if end <= first or last <= begin:
        return False
    distance, rest = divmod(first - begin, one.itemsize)
    if rest or one.stride() != other.stride():
        return True
    steps = sorted(zip(one.stride(), other.shape, one.shape, strict=True), reverse=True)
    return _reaches(distance, steps)


def _reaches(distance: int, steps: list[tuple[int, int, int]]) -> bool:
    """Tell whether steps make up a distance: so many back at most, so many forth, of each size."""
    if not steps:
        return distance == 0
    (step, back, forth), rest = steps[0], steps[1:]
    if not step:
        return _reaches(distance, rest)
    reach = sum(size * (max(a, b) - 1) for size, a, b in rest)
    low = max(1 - back, -((reach - distance) // step))
    high = min(forth - 1, (distance + reach) // step)
    return any(_reaches(distance - many * step, rest) for many in range(low, high + 1))


_Kind: TypeAlias = tuple[int, int, torch.Size, torch.Size, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Written:
    """Keys' and values' caches that may be written, as they were when they were looked at."""

    keys: weakref.ref[Tensor]
    values: weakref.ref[Tensor]
    kind: _Kind
    """Where they begin, their shapes and strides."""
    dtype: torch.dtype
    key_tail: tuple[int, ...]
    """`kv_heads, head_dim`."""
    value_tail: tuple[int, ...]
    low: int
    high: int
    """Addresses: all of both lies between."""
    places: tuple[Tensor, Tensor]
    """The same memory, of bytes if its numbers have eight bits.  Holds the memory, not the tensors,
    and knows neither gradients nor a mode of inference."""
    rows: tuple[Tensor, Tensor] | None
    """`places` slot by slot; None: slots do not lie in one row."""


_WRITTEN: Final[dict[int, Written]] = {}
"""By the `id` of the keys, while keys and values live: a worker's layers come again each step."""


def _known(key_cache: Tensor, value_cache: Tensor) -> Written | None:
    """Give what was seen of these very tensors, unless they have changed memory or shape since."""
    known = _WRITTEN.get(id(key_cache))
    if (
        known is not None
        and known.keys() is key_cache
        and known.values() is value_cache
        and known.dtype is key_cache.dtype is value_cache.dtype
        and known.kind == _kind(key_cache, value_cache)
    ):
        return known
    return None


def _kind(keys: Tensor, values: Tensor) -> _Kind:
    return (
        keys.data_ptr(),
        values.data_ptr(),
        keys.shape,
        values.shape,
        keys.stride(),
        values.stride(),
    )


def _look(key_cache: Tensor, value_cache: Tensor) -> Written:
    """Look at a pair of plain caches that fit together, and remember them while they live.

    Raises:
        InvalidRequest: They cannot be written, or have numbers in common.
    """
    check_written("key_cache", key_cache)
    check_written("value_cache", value_cache)
    if _share_numbers(key_cache, value_cache):
        raise InvalidRequest("key_cache and value_cache have memory in common, which is written")

    def forget(_: object, key: int = id(key_cache)) -> None:
        _WRITTEN.pop(key, None)

    dtype = torch.uint8 if key_cache.dtype == FP8 else None
    places = same_memory(key_cache, dtype), same_memory(value_cache, dtype)
    key_tail, value_tail = tuple(key_cache.shape[2:]), tuple(value_cache.shape[2:])
    rows = None
    with contextlib.suppress(RuntimeError):
        rows = places[0].view(-1, *key_tail), places[1].view(-1, *value_tail)
    (low, end), (begin, high) = memory(key_cache), memory(value_cache)
    made = _WRITTEN[id(key_cache)] = Written(
        weakref.ref(key_cache, forget),
        weakref.ref(value_cache, forget),
        _kind(key_cache, value_cache),
        key_cache.dtype,
        key_tail,
        value_tail,
        min(low, begin),
        max(end, high),
        places,
        rows,
    )
    return made


def same_memory(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Give what may be written in place whatever a tensor's part in gradients or inference.

    Holds the tensor's memory, not the tensor.
    """
    with torch.inference_mode(False), torch.no_grad():
        alias = torch.empty(0, dtype=dtype or tensor.dtype, device=tensor.device)
        return alias.set_(
            tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )


def check_slots(slots: Tensor, num_slots: int) -> bool:
    """Refuse slots outside the pool; -1 is none: tell whether there is one.

    O(slots); on a GPU it waits for the device.

    Raises:
        InvalidRequest: As said.
    """
    if not slots.numel():
        return False
    if slots.is_cpu and slots.numel() <= 256:  # a step that decodes: two operators take longer
        numbers = slots.tolist()
        low, high = min(numbers), max(numbers)
    else:
        low, high = (int(end) for end in torch.aminmax(slots))
    if low < -1 or high >= num_slots:
        raise InvalidRequest(f"slots {low} to {high} are outside the pool's {num_slots} slots")
    return bool(low < 0)


def check_blocks(blocks: Tensor) -> None:
    """Refuse what is no pool of keys and values.

    Raises:
        InvalidRequest: As said.
    """
    check_tensors(blocks=blocks)
    if blocks.dim() != 6 or blocks.shape[1] != 2 or not all(blocks.shape[3:]):
        raise InvalidRequest(
            f"blocks {list(blocks.shape)} on {blocks.device} are not "
            "[num_layers, 2, num_blocks, block_size, kv_heads, head_dim] in memory"
        )
    if blocks.dtype not in (*NUMBERS, FP8, torch.uint8):
        raise InvalidRequest(f"blocks of {blocks.dtype} are no keys and values")
    check_written("blocks", blocks)


def check_copies(blocks: Tensor, copies: Tensor) -> None:
    """Refuse copies outside the pool or whose outcome would depend on their order.

    Raises:
        InvalidRequest: As said.
    """
    check_blocks(blocks)
    check_tensors(copies=copies)
    if copies.dim() != 2 or copies.shape[1] != 3 or copies.dtype != torch.int64:
        raise InvalidRequest(
            f"copies {list(copies.shape)} of {copies.dtype} on {copies.device}: not [n, 3] of "
            "torch.int64 rows (src, dst, num_tokens)"
        )
    if not copies.shape[0]:
        return
    num_blocks, block_size = blocks.shape[2:4]
    if copies.min() < 0 or copies[:, :2].max() >= num_blocks or copies[:, 2].max() > block_size:
        raise InvalidRequest(
            f"copies {copies.tolist()} leave a pool of {num_blocks} blocks of {block_size} tokens"
        )
    check_apart("blocks", blocks, copies=copies)
    written = set(copies[:, 1].tolist())
    if len(written) < copies.shape[0] or written & set(copies[:, 0].tolist()):
        raise InvalidRequest(
            f"copies {copies.tolist()} write a block twice, or one that another copy reads"
        )
