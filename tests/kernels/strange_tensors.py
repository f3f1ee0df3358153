"""Tensors that have not the memory which their shape speaks of, or none, or may not be written."""

from __future__ import annotations

import mmap
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


class Derived(Tensor):
    """A subclass: it may be anything."""


def let_go(given: Tensor) -> Tensor:
    """Its storage was freed, as sharded training does between steps."""
    made = given.clone()
    made.untyped_storage().resize_(0)
    return made


def shrunk(given: Tensor) -> Tensor:
    """Of its storage one number is left."""
    made = given.clone()
    made.untyped_storage().resize_(made.element_size())
    return made


def traced(given: Tensor) -> Tensor:
    """Of a mode that only follows shapes."""
    with FakeTensorMode() as mode:
        return mode.from_tensor(given)


def mapped_over(given: Tensor) -> Tensor:
    """What a function under `vmap` sees, carried out of it."""
    seen: list[Tensor] = []

    def see(one: Tensor) -> Tensor:
        seen.append(one)
        return one

    torch.func.vmap(see)(given.unsqueeze(0))
    return seen[0]


def read_only(given: Tensor) -> Tensor:
    """In memory that is mapped to be read alone."""
    with tempfile.TemporaryFile() as file:
        file.write(given.contiguous().numpy().tobytes())
        file.flush()
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    array = np.frombuffer(mapping, dtype=given.numpy().dtype).reshape(given.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that such must not be written
        return torch.from_numpy(array)


def of_inference(given: Tensor) -> Tensor:
    """Made in inference mode: PyTorch itself writes it there alone."""
    with torch.inference_mode():
        return given.clone()


NOT_PLAIN: dict[str, Callable[[Tensor], Any]] = {
    "a list": Tensor.tolist,
    "an array": lambda t: t.numpy(),
    "nested": lambda t: torch.nested.nested_tensor([*t.reshape(len(t), -1)]),
    "rows of bytes": lambda t: t.flatten(1).to_sparse_csr(),
    "sparse": lambda t: t.to_sparse(),
    "negated": torch._neg_view,
    "meta": lambda t: t.to("meta"),
    "only zeros": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "functional": torch._to_functional_tensor,
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "let go": let_go,
    "shrunk": shrunk,
    "traced": traced,
    "mapped over": mapped_over,
    "derived": lambda t: t.as_subclass(Derived),
}
"""What no operation takes in the place of any tensor."""


def made(name: str, given: Tensor) -> Any:
    """Make one of them, of numbers behind others in memory; None: there is none of such a shape."""
    given = torch.cat([given, given])[len(given) :]  # an address of nothing is not 0 then
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some layouts are in beta
        try:
            return NOT_PLAIN[name](given)
        except (RuntimeError, IndexError):
            return None
