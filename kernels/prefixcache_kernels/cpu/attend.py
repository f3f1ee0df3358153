"""Paged attention by the C library, with the signatures of `reference` and `grouped`.

A step is cut into tasks once; a layer's call fills in its addresses.  All of it is read in place:
no key or value is gathered, converted or repeated in memory.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_kernels.checks import FP8, check_attention
from prefixcache_kernels.cpu.library import Library, library, multiplies_matrices
from prefixcache_kernels.cpu.tasks import Tasks
from prefixcache_kernels.grouped import GroupedPlan
from prefixcache_kernels.plan import Plan, scratch

MAX_DIM: Final = 512
MAX_GROUP: Final = 192
"""Larger heads and groups of heads go to plain PyTorch: a task of theirs outgrows the cache."""

MANY_QUERIES: Final = 16
"""From so many queries per sequence on, PyTorch's products use a processor's matrix units, where it
has them and the library does not: it is compiled without, or what is cached is no bfloat16."""

_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, FP8: 3}
"""`enum type` of `vectors.h`."""

_EIGHTS: Final = torch.arange(256, dtype=torch.uint8).view(FP8).float()


class _Call(ctypes.Structure):
    """`struct call` of `attend.c`, whose comments say what is what."""

    _fields_ = (
        *((name, c_void_p) for name in ("tasks", "queries", "low", "high", "blocks")),
        *((name, c_void_p) for name in ("merge_start", "merge")),
        *((name, c_int64) for name in ("num_tasks", "num_queries")),
        *((name, c_int64) for name in ("heads", "kv_heads", "dim", "value_dim")),
        *((name, c_int64) for name in ("block_size", "pool_blocks", "query_type", "cache_type")),
        ("query_strides", c_int64 * 2),
        ("key_strides", c_int64 * 3),
        ("value_strides", c_int64 * 3),
        *((name, c_float) for name in ("scale", "softcap")),
        ("fixed", c_int64),
        *((name, c_void_p) for name in ("eights", "partial", "room")),
        *((name, c_int64) for name in ("num_threads", "room_size")),
        *((name, c_void_p) for name in ("query", "keys", "values", "sinks")),
        *((name, c_void_p) for name in ("key_scale", "value_scale", "out", "lse")),
    )


@dataclass(slots=True)
class Prepared:
    """A call for layers of one kind: all but its addresses, and what must outlive it."""

    call: _Call
    tasks: Tasks
    held: Tensor
    """Partial answers, then a room for each thread; the thread's scratch."""
    address: Any
    """Of `call`."""
    out: tuple[int, ...]
    """The answer's shape."""

    def point(self, query: Tensor, key_cache: Tensor, value_cache: Tensor, out: Tensor) -> None:
        """Fill in a layer's addresses.

        Raises:
            InvalidRequest: There is no memory for the answer.
        """
        call = self.call
        call.out = where = out.data_ptr()
        if not where and out.numel():
            raise InvalidRequest("a mode of PyTorch is on in which tensors have no memory")
        call.query = query.data_ptr()
        call.keys = key_cache.data_ptr()
        call.values = value_cache.data_ptr()

    def turn(self, keys: int, values: int) -> None:
        """Fill in the addresses of another layer's caches, which were looked at and are alike."""
        self.call.keys, self.call.values = keys, values

    def check(self, failed: int) -> None:
        """Say what `prefixcache_attend` found wrong, if it did.

        Raises:
            InvalidRequest: A block is outside the pool; nothing was computed.
        """
        if failed:
            ids = self.tasks.ids(self.call.block_size)
            raise InvalidRequest(
                f"block tables name blocks {ids.min()} to {ids.max()}; the pool has "
                f"{self.call.pool_blocks}"
            )


def takes(query: Tensor, key_cache: Tensor, value_cache: Tensor, num_seqs: int) -> bool:
    """Tell whether the library is there, made for such plain tensors, and the faster way."""
    if (
        not (query.is_cpu and key_cache.is_cpu and value_cache.is_cpu)  # C gets their addresses
        or query.dim() != 3
        or not value_cache.dim() == key_cache.dim() == 4
        or query.dtype not in _TYPES
        or query.dtype == FP8
        or max(query.shape[2], value_cache.shape[3]) > MAX_DIM
        or query.shape[1] > MAX_GROUP * key_cache.shape[2]
        or not key_cache.stride(3) == value_cache.stride(3) == 1
    ):
        return False
    loaded = library()
    if loaded is None:
        return False
    if query.dtype == torch.bfloat16 and query.shape[0] >= MANY_QUERIES * num_seqs:
        own = loaded.matrices and key_cache.dtype == value_cache.dtype == torch.bfloat16
        return own or not multiplies_matrices()
    return True


def attend(
    plan: Plan | GroupedPlan,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attend as `reference.paged_attention`, reading once what the plan says is shared.

    Arguments, errors and effect are those of `reference.paged_attention`; the tensors are ones that
    the library `takes`.

    Bytes read: of each run and each own part the keys and values, once; per answer of a query and a
    head in a task `4 * (value_dim + 2)` are written and read.
    """
    if query.stride(2) != 1:
        query = query.contiguous()
    given = not sinks is key_scale is value_scale is lse is None or key_cache.dtype == FP8
    if given:  # what a plan has prepared does not name is looked at in every layer
        check_attention(
            query,
            key_cache,
            value_cache,
            sinks=sinks,
            key_scale=key_scale,
            value_scale=value_scale,
            lse=lse,
        )
    prepared = _prepared(plan, query, key_cache, value_cache, scale, window, softcap)
    out = query.new_empty(prepared.out)
    prepared.point(query, key_cache, value_cache, out)
    call = prepared.call
    if given:
        sinks = None if sinks is None else sinks.float().contiguous()
        call.sinks, call.key_scale, call.value_scale, call.lse = (
            None if t is None else t.data_ptr() for t in (sinks, key_scale, value_scale, lse)
        )
    loaded = library()
    assert loaded is not None  # `takes` said so
    failed = loaded.handle.prefixcache_attend(prepared.address)
    if given:
        call.sinks = call.key_scale = call.value_scale = call.lse = None
    prepared.check(failed)
    return out


def prepare(
    plan: Plan | GroupedPlan,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> Prepared:
    """Describe a layer's attention for a caller who runs it in C: nothing is computed here.

    For other layers with caches of the same kind, and the same window, it is turned to theirs.

    Args:
        plan: as of `attend`, and so are the following.
        query: `[T, heads, head_dim]`, contiguous; it may be filled after this call.
        key_cache: `[num_blocks, block_size, kv_heads, head_dim]`.
        value_cache: likewise.
        out: `[T, heads, value_dim]` of the query's type, contiguous: where the answers go.
        scale: of the scores.
        window: Keys that a query attends at most, itself included; None: all before it.

    Raises:
        InvalidRequest: As of `attend`.
    """
    prepared = _prepared(plan, query, key_cache, value_cache, scale, window, None)
    if out.shape != prepared.out or out.dtype != query.dtype or not out.is_contiguous():
        raise InvalidRequest(f"out {list(out.shape)} of {out.dtype}: not {list(prepared.out)}")
    prepared.point(query, key_cache, value_cache, out)
    return prepared


def _prepared(
    plan: Plan | GroupedPlan,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Prepared:
    """Give what was prepared for layers of this kind, or prepare it."""
    loaded = library()
    assert loaded is not None
    key = (
        threading.get_ident(),
        torch.get_num_threads() if loaded.threaded else 1,
        window,
        scale,
        softcap,
        query.dtype,
        key_cache.dtype,
        value_cache.dtype,
        query.shape,
        query.stride(),
        key_cache.shape,
        key_cache.stride(),
        value_cache.shape,
        value_cache.stride(),
    )
    prepared: Prepared | None = plan.calls.get(key)
    if prepared is None:
        if key_cache.dtype != FP8:  # with its scales it was looked at
            check_attention(query, key_cache, value_cache)
        plan.check(query, key_cache)
        prepared = _prepare(plan, query, key_cache, value_cache, window, key[1], loaded)
        prepared.call.scale, prepared.call.softcap = scale, softcap or 0
        plan.calls[key] = prepared
    return prepared


def _prepare(
    plan: Plan | GroupedPlan,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int | None,
    threads: int,
    loaded: Library,
) -> Prepared:
    """Cut the batch, and describe layers like this one."""
    heads, dim = query.shape[1:]
    num_blocks, block_size, kv_heads, value_dim = values.shape
    tasks = plan.tasks(window, heads // kv_heads)
    call = _Call(
        num_tasks=len(tasks.tasks),
        num_queries=query.shape[0],
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        value_dim=value_dim,
        block_size=block_size,
        pool_blocks=num_blocks,
        query_type=_TYPES[query.dtype],
        cache_type=_TYPES[keys.dtype],
        query_strides=_in_bytes(query),
        key_strides=_in_bytes(keys),
        value_strides=_in_bytes(values),
        eights=_EIGHTS.data_ptr(),
        fixed=isinstance(plan, Plan) and plan.fixed,
        num_threads=threads,
    )
    for name in ("tasks", "queries", "low", "high", "blocks", "merge_start", "merge"):
        setattr(call, name, getattr(tasks, name).ctypes.data)
    call.room_size = loaded.handle.prefixcache_room(ctypes.byref(call))
    answers = len(tasks.queries) * heads * (value_dim + 2)
    held = scratch(answers + threads * call.room_size, torch.float32)
    call.partial, call.room = held.data_ptr(), held[answers:].data_ptr()
    out = (*query.shape[:2], value_dim)
    return Prepared(call, tasks, held, ctypes.byref(call), out)


def _in_bytes(tensor: Tensor) -> tuple[int, ...]:
    """All strides but the last."""
    return tuple(stride * tensor.element_size() for stride in tensor.stride()[:-1])
