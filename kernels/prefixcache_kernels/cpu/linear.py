"""Matrix products by the C library: weights in the order in which they are read.

```
weight [outputs, inputs]        packed, a panel of 16 outputs after the other
o0  i0 i1 i2 i3 ...             bfloat16   o0 i0 i1 | o1 i0 i1 | ... o15 i0 i1 | o0 i2 i3 | ...
o1  i0 i1 i2 i3 ...             float32    o0 i0 | o1 i0 | ... o15 i0 | o0 i1 | ...
                                int8       16 scales | as bfloat16, for 64 inputs | 16 scales | ...
```

The order is the same on every processor, so a file of packed weights serves all of them.  A row's
numbers have the same bits alone and beside others, for any number of threads; see `linear.c`.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from numbers import Real
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody knows
from torch import Tensor

from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache.types import shown
from prefixcache_kernels.checks import LARGEST, check_tensors
from prefixcache_kernels.cpu.library import at_hand

PANEL: Final = 16
"""Outputs that are read together."""

GROUP: Final = 64
"""Inputs of an output that share a scale, in eight bits."""

_RECORD: Final = PANEL * (2 + GROUP)
"""Bytes of a panel's group in eight bits: 16 scales, and the codes."""

_MOST_CODE: Final = 127

_FROM: Final = (torch.float32, torch.bfloat16)
"""What is packed."""

WEIGHT_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 4}
ROW_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`enum type` of `vectors.h`."""

MOST_INPUTS: Final = 1 << 20

_STORED: Final = 0
_GATED: Final = 2


class _Linear(ctypes.Structure):
    """`struct linear` of `linear.h`, whose comments say what is what."""

    _fields_ = (
        *((name, c_void_p) for name in ("weights", "bias", "x", "norm", "out", "room")),
        *((name, c_int64) for name in ("rows", "inputs", "outputs", "columns")),
        *((name, c_int64) for name in ("x_stride", "out_stride")),
        *((name, c_int64) for name in ("weight_type", "x_type", "out_type", "after")),
        ("num_threads", c_int64),
        ("eps", c_float),
    )


@dataclass(frozen=True, eq=False, slots=True)
class Matrix:
    """A packed weight, checked when it is made.

    Args:
        data: its numbers, in one row; never changed, so it may be a file that is mapped.
        inputs: of a row.
        columns: of the answer.
        gated: two weights by turns, a panel each: the answer is `silu(first) * second`.
        bias: float32, in the order of the panels; or None.

    Raises:
        InvalidRequest: they do not fit together.
    """

    data: Tensor
    inputs: int
    columns: int
    gated: bool = False
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensors(data=self.data)
        if not isinstance(self.gated, bool):
            raise InvalidRequest(f"gated is {shown(self.gated)}, not True or False")
        if self.data.dtype not in WEIGHT_TYPES or not self.data.is_cpu or self.data.dim() != 1:
            raise InvalidRequest(
                f"packed weights {list(self.data.shape)} of {self.data.dtype} on "
                f"{self.data.device}: not one row of {' or '.join(map(str, WEIGHT_TYPES))}"
            )
        if (
            not (type(self.inputs) is type(self.columns) is int)
            or not 2 <= self.inputs <= MOST_INPUTS
            or self.inputs % 2
            or self.columns < 1
            or self.data.numel() != self._num_packed
            or not self.data.is_contiguous()
        ):
            raise InvalidRequest(
                f"{self.data.numel()} packed weights for {self.inputs!r} inputs and "
                f"{self.columns!r} columns: not {PANEL} times as many as there are panels and "
                f"inputs, these even, from 2 to {MOST_INPUTS}; of eight bits, {_RECORD} for each "
                f"panel and {GROUP} inputs"
            )
        if self.bias is not None:
            check_numbers("bias", self.bias, self.outputs)

    @property
    def outputs(self) -> int:
        """Outputs of the packed weights, those included that fill the last panels."""
        panels = -(-self.columns // PANEL)
        return PANEL * panels * (2 if self.gated else 1)

    @property
    def _num_packed(self) -> int:
        """Numbers of the packed weights."""
        if self.data.dtype == torch.int8:
            return self.outputs // PANEL * num_groups(self.inputs) * _RECORD
        return self.outputs * self.inputs

    def multiply(self, x: Tensor, *, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
        """Multiply rows; see the file's head for what may be relied on.

        Args:
            x: `[rows, inputs]`, its rows contiguous.
            norm: float32 `[inputs]`: rows are divided by their root mean square, times this.
            eps: is added to the mean square.

        Returns:
            float32 `[rows, columns]`.

        Raises:
            InvalidRequest: the shapes or types do not fit together, or the weights have lost their
                memory.
            Unsupported: there is no C library.
        """
        check_rows("x", x, self.inputs)
        check_tensors(data=self.data)
        eps = check_eps(eps)
        if norm is not None:
            check_numbers("norm", norm, self.inputs)
        out = x.new_empty((x.shape[0], self.columns), dtype=torch.float32)
        check_tensors(out=out)  # not so in a mode of PyTorch that only traces
        threads = torch.get_num_threads()
        room = torch.empty(room_size(x.shape[0], self.inputs, threads))
        call = _Linear(
            weights=self.data.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            x=x.data_ptr(),
            norm=None if norm is None else norm.data_ptr(),
            out=out.data_ptr(),
            room=room.data_ptr(),
            rows=x.shape[0],
            inputs=self.inputs,
            outputs=self.outputs,
            columns=self.columns,
            x_stride=x.stride(0) * x.element_size(),
            out_stride=self.columns * 4,
            weight_type=WEIGHT_TYPES[self.data.dtype],
            x_type=ROW_TYPES[x.dtype],
            out_type=0,
            after=_GATED if self.gated else _STORED,
            num_threads=threads,
            eps=eps,
        )
        if x.shape[0]:
            at_hand().handle.prefixcache_linear(ctypes.byref(call))
        return out

    def unpacked(self) -> Tensor:
        """Give the weight as it was, `[columns, inputs]`; if gated, the two under each other.

        Of eight bits: what is left of it, in float32.
        """
        parts = 2 if self.gated else 1
        panels = self.data.view(self.outputs // PANEL, -1)
        if self.data.dtype == torch.int8:
            records = panels.view(-1, num_groups(self.inputs), _RECORD)
            scales = records[..., : 2 * PANEL].contiguous().view(torch.bfloat16).float()
            codes = records[..., 2 * PANEL :].reshape(*scales.shape[:2], GROUP // 2, PANEL, 2)
            groups = codes.permute(0, 3, 1, 2, 4).flatten(3).float()
            rows = (groups * scales.transpose(1, 2)[..., None]).flatten(2)[..., : self.inputs]
        elif self.data.dtype == torch.bfloat16:
            rows = panels.view(-1, self.inputs // 2, PANEL, 2).transpose(1, 2)
        else:
            rows = panels.view(-1, self.inputs, PANEL).transpose(1, 2)
        rows = rows.reshape(-1, parts, PANEL, self.inputs).transpose(0, 1)
        return rows.reshape(parts, -1, self.inputs)[:, : self.columns].flatten(0, 1)


def pack(weight: Tensor, *, gated: bool = False) -> Tensor:
    """Give a weight's numbers in the order in which they are read.

    Args:
        weight: `[outputs, inputs]`, inputs even.
        gated: its first half is what gates the second half.

    Raises:
        InvalidRequest: no plain tensor, or not two halves where it is gated.
        Unsupported: an odd number of inputs, or a type that is not packed.
    """
    _check_weight(weight, gated)
    panels = in_panels(weight, gated=gated)
    if weight.dtype == torch.bfloat16:
        pairs = panels.view(-1, PANEL, weight.shape[1] // 2, 2)
        return pairs.transpose(1, 2).reshape(-1).contiguous()
    return panels.transpose(1, 2).reshape(-1).contiguous()


def quantize(weight: Tensor, *, gated: bool = False) -> Tensor:
    """Give a weight in eight bits, in the order in which it is read.  Takes some seconds per GB.

    Each 64 inputs of an output are whole multiples, -127 to 127, of a scale of their own.

    Args:
        weight: `[outputs, inputs]`, inputs even, of float32 or bfloat16.
        gated: its first half is what gates the second half.

    Raises:
        InvalidRequest: no plain tensor, or not two halves where it is gated.
        Unsupported: an odd number of inputs, another type, or numbers that are not finite.
    """
    _check_weight(weight, gated)
    if not bool(weight.isfinite().all()):
        raise Unsupported("weights that are not finite have no eight bits")
    panels = F.pad(in_panels(weight, gated=gated), (0, -weight.shape[1] % GROUP))
    groups = panels.view(*panels.shape[:2], -1, GROUP)
    # The scales are rounded up, so that no number is beyond the largest code.
    exact = groups.abs().amax(-1).float() / _MOST_CODE
    scales = exact.to(torch.bfloat16)
    following = (scales.view(torch.int16) + 1).view(torch.bfloat16)
    scales = torch.where(scales.float() < exact, following, scales)
    steps = scales.float().clamp(min=torch.finfo(torch.float32).tiny)
    codes = (groups.float() / steps[..., None]).round().clamp(-_MOST_CODE, _MOST_CODE)
    pairs = codes.to(torch.int8).view(*codes.shape[:3], GROUP // 2, 2).permute(0, 2, 3, 1, 4)
    bare = scales.transpose(1, 2).contiguous().view(torch.int8)
    return torch.cat([bare, pairs.flatten(2)], -1).flatten()


def _check_weight(weight: Tensor, gated: bool) -> None:
    """Refuse what is not packed.

    Raises:
        InvalidRequest: as of `pack`.
        Unsupported: as of `pack`.
    """
    check_tensors(weight=weight)
    if not isinstance(gated, bool):
        raise InvalidRequest(f"gated is {shown(gated)}, not True or False")
    if weight.dim() != 2 or weight.dtype not in _FROM or weight.shape[1] % 2 or not weight.numel():
        raise Unsupported(f"weights {list(weight.shape)} of {weight.dtype} are not packed")
    if gated and weight.shape[0] % 2:
        raise InvalidRequest(f"gated weights {list(weight.shape)} are not two of the same size")


def num_groups(inputs: int) -> int:
    """Give how many scales an output of eight bits has."""
    return -(-inputs // GROUP)


def room_size(rows: int, inputs: int, threads: int) -> int:
    """Give the floats of room that a product takes: `room` of `linear.h`."""
    return (rows + threads) * num_groups(inputs) * GROUP


def in_panels(rows: Tensor, *, gated: bool = False) -> Tensor:
    """Give rows in panels of 16, filled up with zeros; if gated, panels of both halves by turns."""
    parts = rows.reshape(2 if gated else 1, -1, *rows.shape[1:])
    missing = -parts.shape[1] % PANEL
    if missing:
        zeros = parts.new_zeros(parts.shape[0], missing, *rows.shape[1:])
        parts = torch.cat([parts, zeros], 1)
    panels = parts.reshape(parts.shape[0], -1, PANEL, *rows.shape[1:])
    return panels.transpose(0, 1).flatten(0, 1)


def check_eps(eps: float) -> float:
    """Refuse what is not added to a mean square; give it as a number.

    Raises:
        InvalidRequest: it is no finite number from 0.
    """
    if not isinstance(eps, Real) or isinstance(eps, bool) or not 0 <= eps <= LARGEST:
        raise InvalidRequest(f"eps is {shown(eps)}, not a number from 0 to {LARGEST:g}")
    return float(eps)


def check_rows(name: str, x: Tensor, inputs: int) -> None:
    """Refuse rows of other numbers than a matrix takes.

    Raises:
        InvalidRequest: as said.
    """
    check_tensors(**{name: x})
    if (
        x.dim() != 2
        or x.shape[1] != inputs
        or x.dtype not in ROW_TYPES
        or not x.is_cpu
        or x.stride(1) != 1
        or (x.shape[0] > 1 and x.stride(0) < inputs)
    ):
        raise InvalidRequest(
            f"{name} {list(x.shape)} of {x.dtype} on {x.device} with strides {x.stride()}: not "
            f"[rows, {inputs}] of a floating type on a CPU, each row's numbers side by side"
        )


def check_numbers(name: str, numbers: Tensor, num: int) -> None:
    """Refuse what is not so many float32 numbers in one row.

    Raises:
        InvalidRequest: as said.
    """
    check_tensors(**{name: numbers})
    if (
        numbers.shape != (num,)
        or numbers.dtype != torch.float32
        or not numbers.is_cpu
        or not numbers.is_contiguous()
    ):
        raise InvalidRequest(
            f"{name} {list(numbers.shape)} of {numbers.dtype} on {numbers.device}: not [{num}] of "
            "torch.float32 on a CPU, contiguous"
        )
