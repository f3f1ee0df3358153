"""A network's layers by the C library: everything between the embedding and the last norm.

```
x [T, hidden] float32 ──► for each layer, one call of `layer.c` ──► x [R, hidden]
                           norm + qkv │ rotate, store │ attention │ out + x │ norm + gate, up │ down + x
```

Of the last layer only the rows that become logits go on behind attention.
"""  # noqa: E501 - a drawing

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache.types import shown
from prefixcache_kernels.checks import (
    check_apart,
    check_ids,
    check_layers,
    check_scalars,
    check_slots,
    check_tensors,
    check_written,
    same_memory,
)
from prefixcache_kernels.cpu import attend
from prefixcache_kernels.cpu.library import at_hand
from prefixcache_kernels.cpu.linear import (
    ROW_TYPES,
    WEIGHT_TYPES,
    Matrix,
    check_eps,
    check_numbers,
    check_rows,
    room_size,
)
from prefixcache_kernels.grouped import GroupedPlan
from prefixcache_kernels.plan import Plan

MOST_DIM: Final = attend.MAX_DIM

_BEFORE: Final = 1
_AFTER: Final = 2


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weights", "bias")),
        *((name, c_int64) for name in ("inputs", "outputs", "columns", "type")),
    )


class _Layer(ctypes.Structure):
    """`struct layer` of `layer.c`."""

    _fields_ = (
        *((name, _Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
    )


class _Step(ctypes.Structure):
    """`struct step` of `layer.c`, whose comments say what is what."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "wide", "query", "attended", "room")),
        *((name, c_void_p) for name in ("cos", "sin", "slots", "keys", "values")),
        *((name, c_int64) for name in ("rows", "heads", "kv_heads", "dim")),
        *((name, c_int64) for name in ("pool_type", "num_threads", "key_stride", "value_stride")),
        ("eps", c_float),
    )


@dataclass(frozen=True, eq=False, slots=True)
class LayerWeights:
    """Weights of one layer; norms are float32.  `q_norm` and `k_norm` come together, or not."""

    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int | None = None


class Sizes(NamedTuple):
    """Of a network's layers."""

    hidden: int
    width: int
    heads: int
    kv_heads: int
    dim: int
    eps: float
    scale: float


class Rotation(NamedTuple):
    """Cosines and sines of a step's positions: float32 `[T, dim / 2]`."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, positions: Tensor, frequencies: Tensor, scale: float) -> Rotation:
        """Rotate by position times frequency.  Each position's numbers are those it has alone.

        Args:
            positions: int64 `[T]`.
            frequencies: float32 `[dim / 2]`.
            scale: of all cosines and sines.

        Raises:
            InvalidRequest: these are other tensors.
            Unsupported: there is no C library.
        """
        check_tensors(frequencies=frequencies, positions=positions)
        check_numbers("frequencies", frequencies, frequencies.numel())
        scale, _, _ = check_scalars(scale, None, None)
        if positions.dtype != torch.int64 or positions.dim() != 1 or not positions.is_cpu:
            raise InvalidRequest(f"positions {list(positions.shape)} of {positions.dtype}")
        positions = positions.contiguous()
        rows, half = positions.shape[0], frequencies.shape[0]
        made = cls(torch.empty(rows, half), torch.empty(rows, half))
        check_tensors(**made._asdict())  # not so in a mode of PyTorch that only traces
        at_hand().handle.prefixcache_rotation(
            positions.data_ptr(),
            frequencies.data_ptr(),
            rows,
            half,
            scale,
            made.cos.data_ptr(),
            made.sin.data_ptr(),
        )
        return made


class Layers:
    """Some layers, checked once.  For any thread.

    Args:
        layers: in their order.
        sizes: of all of them.

    Raises:
        InvalidRequest: the weights do not fit together.
    """

    def __init__(self, layers: Sequence[LayerWeights], sizes: Sizes) -> None:
        if not isinstance(layers, Sequence) or not layers:
            raise InvalidRequest("there are no layers")
        if not isinstance(sizes, Sizes):
            raise InvalidRequest(f"sizes are {shown(sizes)}, not Sizes")
        counts = sizes[:5]
        if not all(type(count) is int and count >= 1 for count in counts):
            raise InvalidRequest(f"{shown(sizes)}: sizes are integers, at least 1")
        hidden, width, heads, kv_heads, dim = counts
        scale, _, _ = check_scalars(sizes.scale, None, None)
        self.layers = tuple(layers)
        self.sizes = sizes._replace(eps=check_eps(sizes.eps), scale=scale)
        if dim % 2 or not 2 <= dim <= MOST_DIM or heads % kv_heads or heads < 1:
            raise InvalidRequest(
                f"{heads} heads on {kv_heads} of {dim}: heads are even, from 2 to {MOST_DIM}, and "
                "queries' heads a multiple of the keys'"
            )
        wanted = {
            "qkv": (hidden, (heads + 2 * kv_heads) * dim, False),
            "out": (heads * dim, hidden, False),
            "gate_up": (hidden, width, True),
            "down": (width, hidden, False),
        }
        for layer in self.layers:
            if not isinstance(layer, LayerWeights):
                raise InvalidRequest(f"a layer is {shown(layer)}, not LayerWeights")
            check_scalars(1.0, layer.window, None)
            for name, shape in wanted.items():
                matrix: Matrix = getattr(layer, name)
                if not isinstance(matrix, Matrix):
                    raise InvalidRequest(f"{name} is {shown(matrix)}, not a Matrix")
                if (matrix.inputs, matrix.columns, matrix.gated) != shape:
                    raise InvalidRequest(
                        f"{name} is {matrix.inputs}, {matrix.columns}: not {shape}"
                    )
            check_numbers("input_norm", layer.input_norm, hidden)
            check_numbers("post_norm", layer.post_norm, hidden)
            if (layer.q_norm is None) != (layer.k_norm is None):
                raise InvalidRequest("q_norm and k_norm come together")
            for norm in (layer.q_norm, layer.k_norm):
                if norm is not None:
                    check_numbers("a norm of heads", norm, dim)
        # Their memory stays where it is, whatever becomes of the tensors: C is told its addresses.
        self._memory = [same_memory(given) for layer in self.layers for given in _tensors(layer)]
        self._addresses = [given.data_ptr() for given in self._memory]
        self._described = (_Layer * len(self.layers))(*map(_describe, self.layers))
        at = ctypes.addressof(self._described)
        self._places = [at + i * ctypes.sizeof(_Layer) for i in range(len(self.layers))]

    def __call__(
        self,
        x: Tensor,
        rotation: Rotation,
        slots: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        plan: Plan | GroupedPlan,
        rows: Tensor,
    ) -> Tensor:
        """Run a batch: its keys and values go to their slots.

        Args:
            x: float32 `[T, hidden]`, contiguous; it is written over.
            rotation: of its positions.
            slots: int64 `[T]`: where their keys and values go; -1: nowhere.
            keys: of each layer, `[blocks, block_size, kv_heads, dim]` of a floating type; shape,
                type and strides are the same in all layers.
            values: likewise.
            plan: of the batch.
            rows: int64 `[R]`: which go on behind the last layer's attention, 0 to T - 1.

        Returns:
            float32 `[R, hidden]`.

        Raises:
            InvalidRequest: the tensors do not fit together, or slots or blocks are outside the
                pool.
            Unsupported: there is no C library.
        """
        hidden, width, heads, kv_heads, dim, eps, scale = self.sizes
        check_rows("x", x, hidden)
        num = x.shape[0]
        if not isinstance(rotation, Rotation):
            raise InvalidRequest(f"rotation is {shown(rotation)}, not a Rotation")
        if not isinstance(plan, Plan | GroupedPlan):
            raise InvalidRequest(f"plan is {shown(plan)}, not a Plan or a GroupedPlan")
        if [given.data_ptr() for given in self._memory] != self._addresses:
            raise InvalidRequest("weights have let go of their memory since they were checked")
        if not (isinstance(keys, Sequence) and isinstance(values, Sequence)):
            raise InvalidRequest(f"keys {shown(keys)} and values {shown(values)}: not one a layer")
        for name, part in rotation._asdict().items():
            check_rows(name, part, dim // 2)
            if part.shape[0] != num or part.dtype != torch.float32 or not part.is_contiguous():
                raise InvalidRequest(f"{name} is {list(part.shape)}, not [{num}, {dim // 2}]")
        if not len(keys) == len(values) == len(self.layers):
            raise InvalidRequest(f"{len(keys)} layers of a pool for {len(self.layers)} layers")
        check_tensors(keys=keys[0], values=values[0], slots=slots, rows=rows)
        dtype = keys[0].dtype
        if x.dtype != torch.float32 or not x.is_contiguous() or dtype not in ROW_TYPES:
            raise InvalidRequest(f"x of {x.dtype} for a pool of {dtype}")
        check_written("x", x)
        check_apart("x", x, slots=slots, rows=rows, **rotation._asdict())
        if rows.dtype != torch.int64 or rows.dim() != 1 or not rows.is_cpu:
            raise InvalidRequest(f"rows {list(rows.shape)} of {rows.dtype} on {rows.device}")
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < num:
            raise InvalidRequest(f"rows {int(rows.min())} to {int(rows.max())} of {num}")
        query = torch.empty(num, heads, dim, dtype=dtype)
        attended = torch.empty_like(query)
        fresh = torch.empty(num, 2 * kv_heads, dim, dtype=dtype)  # as they go to their slots
        slots = slots.contiguous()
        caches = check_layers(
            fresh[:, :kv_heads],
            fresh[:, kv_heads:],
            keys,
            values,
            slots,
            x=x,
            rows=rows,
            **rotation._asdict(),
        )
        for cache in (keys[0], values[0]):  # those of other layers are of the same kind
            if (
                cache.stride(3) != 1
                or cache.stride(2) != dim
                or cache.stride(0) != cache.shape[1] * cache.stride(1)
            ):
                raise InvalidRequest(
                    f"a pool with strides {cache.stride()}: its slots do not lie in one row"
                )
        check_slots(slots, keys[0].shape[0] * keys[0].shape[1])
        threads = torch.get_num_threads()
        wide = torch.empty(num * max((heads + 2 * kv_heads) * dim, width))
        room = torch.empty(room_size(num, max(hidden, width, heads * dim), threads))
        library = at_hand()
        step = _Step(
            x=x.data_ptr(),
            wide=wide.data_ptr(),
            query=query.data_ptr(),
            room=room.data_ptr(),
            cos=rotation.cos.data_ptr(),
            sin=rotation.sin.data_ptr(),
            slots=slots.data_ptr(),
            attended=attended.data_ptr(),
            rows=num,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            pool_type=ROW_TYPES[dtype],
            num_threads=threads,
            key_stride=keys[0].stride(1) * dtype.itemsize,
            value_stride=values[0].stride(1) * dtype.itemsize,
            eps=eps,
        )
        last = len(self.layers) - 1
        run, at = library.handle.prefixcache_layer, ctypes.byref(step)
        calls: dict[int | None, attend.Prepared] = {}
        for window in dict.fromkeys(layer.window for layer in self.layers):
            calls[window] = call = attend.prepare(
                plan, query, keys[0], values[0], attended, scale=scale, window=window
            )
            # The first layer stores before it attends: a block that is none is found before that.
            check_ids(call.tasks.ids(keys[0].shape[1]), keys[0].shape[0])
        for index, layer in enumerate(self.layers):
            call = calls[layer.window]
            step.keys, step.values = caches[index].kind[:2]
            call.turn(step.keys, step.values)
            parts = _BEFORE | (_AFTER if index < last else 0)
            call.check(run(at, self._places[index], call.address, parts))
            if index < last:
                continue
            x, attended = x[rows].contiguous(), attended[rows].contiguous()
            step.x, step.attended, step.rows = x.data_ptr(), attended.data_ptr(), x.shape[0]
            if x.shape[0]:
                run(at, self._places[index], None, _AFTER)
        return x


def _tensors(layer: LayerWeights) -> list[Tensor]:
    """Give all tensors of a layer's weights."""
    matrices = (layer.qkv, layer.out, layer.gate_up, layer.down)
    norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
    given = (*(m.data for m in matrices), *(m.bias for m in matrices), *norms)
    return [tensor for tensor in given if tensor is not None]


def _describe(layer: LayerWeights) -> _Layer:
    def matrix(given: Matrix) -> _Matrix:
        return _Matrix(
            weights=given.data.data_ptr(),
            bias=None if given.bias is None else given.bias.data_ptr(),
            inputs=given.inputs,
            outputs=given.outputs,
            columns=given.columns,
            type=WEIGHT_TYPES[given.data.dtype],
        )

    def numbers(given: Tensor | None) -> Any:
        return None if given is None else given.data_ptr()

    return _Layer(
        qkv=matrix(layer.qkv),
        out=matrix(layer.out),
        gate_up=matrix(layer.gate_up),
        down=matrix(layer.down),
        input_norm=numbers(layer.input_norm),
        post_norm=numbers(layer.post_norm),
        q_norm=numbers(layer.q_norm),
        k_norm=numbers(layer.k_norm),
    )
