"""Move cached keys to other positions: rotary embeddings turn by the difference alone.

A rotary embedding (Su et al. 2021) turns pair i of a key at position p by the angle `p * f[i]`.
Turning it once more by `delta * f[i]` makes it the key of position `p + delta`: no need to know p,
and values do not change.  So text that was computed at one place of a prompt can be put at another.

```
head_dim   0 ─────────── half ─────────── 2 * half ───────── head_dim
           x             │ y              │ not turned (a partial rotary factor)
pair i     (x[i], y[i])  ->  (x cos - y sin, y cos + x sin)    angle delta * f[i]
```

The angles are computed in double precision on the host, for a float32 product of a long distance
and a frequency is off by more than a bfloat16 can tell.  Bytes moved: each key is read once and
written once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache.types import shown
from prefixcache_kernels.checks import (
    LONGEST,
    NUMBERS,
    check_apart,
    check_blocks,
    check_slots,
    check_tensors,
    same_memory,
)

_WIDEST = 1 << 16
"""Numbers of one head."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """The frequencies of a model's rotary embedding."""

    frequencies: tuple[float, ...]
    """Radians per position of each pair; at most `head_dim / 2` of them."""

    def __post_init__(self) -> None:
        """Refuse angles that are no numbers."""
        if not isinstance(self.frequencies, tuple):
            raise InvalidRequest(f"frequencies are a {type(self.frequencies).__name__}, no tuple")
        for each in self.frequencies:
            if isinstance(each, bool) or not isinstance(each, int | float):
                raise InvalidRequest(f"a frequency is {shown(each)}, not a number of radians")
            if not -1e6 <= each <= 1e6:
                raise InvalidRequest(f"a frequency is {shown(each)} radians per position")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int) -> Rotary:
        """Read the `rope_parameters` or `rope_scaling` of a Hugging Face config.  Changes nothing.

        Known are the types `default`, `linear` and `llama3`.  The formulas are those of
        transformers' `modeling_rope_utils`.

        Args:
            config: The fields `rope_type` (or `type`), `rope_theta`, `factor` and so on.
            head_dim: Of the model.

        Raises:
            Unsupported: Another type, named: its angles depend on more than the distance.
            InvalidRequest: A field is missing, or no number of pairs comes out.

        >>> Rotary.from_config({"rope_theta": 10000.0}, 4).frequencies
        (1.0, 0.01)
        >>> Rotary.from_config({"type": "linear", "factor": 4.0}, head_dim=2).frequencies
        (0.25,)
        """
        kind = config.get("rope_type") or config.get("type") or "default"
        if not isinstance(kind, str) or kind not in ("default", "linear", "llama3"):
            raise Unsupported(
                f"cached keys of a model with rope_type {shown(kind)} cannot be moved; "
                "default, linear and llama3 can"
            )
        theta = _positive(config, "rope_theta", 10000.0)
        share = _positive(config, "partial_rotary_factor", 1.0)
        is_size = isinstance(head_dim, int) and not isinstance(head_dim, bool)
        if not is_size or not 0 < head_dim <= _WIDEST or not 0 < share <= 1:
            raise InvalidRequest(f"heads of {shown(head_dim)}, of which {share:g} is turned")
        pairs = int(head_dim * share) // 2
        if pairs < 1:
            raise InvalidRequest(f"heads of {head_dim} and theta {theta:g} make no pair to turn")
        plain = [theta ** (-i / pairs) for i in range(pairs)]
        if kind == "linear":
            factor = _positive(config, "factor")
            plain = [f / factor for f in plain]
        elif kind == "llama3":
            plain = _llama3(plain, config)
        return cls(tuple(plain))

    def turn(self, delta: int) -> Tensor:
        """Give `[2, pairs]` float32: cosine and sine of each pair's angle for a distance."""
        angles = [math.fmod(delta * f, 2 * math.pi) for f in self.frequencies]
        return torch.tensor([[math.cos(a) for a in angles], [math.sin(a) for a in angles]])


def _positive(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Read a field that is a number above 0.

    Raises:
        InvalidRequest: It is another thing, or missing.
    """
    given = config.get(name, default)
    if given is None and name not in config:
        raise InvalidRequest(f"the rotary embedding needs the field {name!r}")
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise InvalidRequest(f"the rotary embedding's {name} is {shown(given)}, not a number")
    if not 1e-9 <= given <= 1e30:
        raise InvalidRequest(
            f"the rotary embedding's {name} is {shown(given)}, not above 0 and finite"
        )
    return float(given)


def _llama3(frequencies: list[float], config: Mapping[str, Any]) -> list[float]:
    """Slow down long waves by `factor`, leave short ones, and blend in between."""
    factor, low = _positive(config, "factor"), _positive(config, "low_freq_factor")
    high = _positive(config, "high_freq_factor")
    length = _positive(config, "original_max_position_embeddings")
    if low >= high:
        raise InvalidRequest(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}")

    def slow(frequency: float) -> float:
        turns = length * frequency / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        return (1 - share) * frequency / factor + share * frequency

    return [slow(frequency) for frequency in frequencies]


def rotate_keys(blocks: Tensor, slots: Tensor, delta: int, angles: Rotary) -> None:
    """Turn the keys of some slots, in all layers, to positions `delta` later.  Values stay.

    Plain PyTorch, computed in float32 and rounded once.  O(slots).

    Args:
        blocks: `[num_layers, 2, num_blocks, block_size, kv_heads, head_dim]`, keys turned before
            they were stored, as Llama, Mistral, Qwen and Gemma do.
        slots: `[n]` int64, `block * block_size + offset`, each at most once; -1 skips.
        delta: Positions to move by, negative towards the front.
        angles: Of the model.

    Raises:
        InvalidRequest: The shapes do not fit together, or a slot lies outside the pool.
    """
    check_rotation(blocks, slots, delta, angles)
    check_slots(slots, blocks.shape[2] * blocks.shape[3])
    blocks = same_memory(blocks)
    slots = slots[slots >= 0]
    half = len(angles.frequencies)
    cosine, sine = angles.turn(delta)
    for layer in blocks:
        keys = layer[0].flatten(0, 1)
        turned = keys[slots]
        x, y = turned[..., :half].float(), turned[..., half : 2 * half].float()
        x, y = x * cosine - y * sine, y * cosine + x * sine
        turned[..., :half], turned[..., half : 2 * half] = x.to(keys.dtype), y.to(keys.dtype)
        keys.index_copy_(0, slots, turned)


def oracle_rotate(blocks: Tensor, slots: Tensor, delta: int, angles: Rotary) -> Tensor:
    """What `rotate_keys` means: one slot after the other in double precision; gives a new pool."""
    out = blocks.double().clone()
    half, size = len(angles.frequencies), blocks.shape[3]
    angle = delta * torch.tensor(angles.frequencies, dtype=torch.float64)
    for slot in slots.tolist():
        if slot >= 0:
            key = out[:, 0, slot // size, slot % size]
            pairs = torch.complex(key[..., :half], key[..., half : 2 * half])
            pairs = pairs * torch.polar(torch.ones_like(angle), angle)
            key[..., :half], key[..., half : 2 * half] = pairs.real, pairs.imag
    return out


def check_rotation(blocks: Tensor, slots: Tensor, delta: int, angles: Rotary) -> None:
    """Refuse what `rotate_keys` cannot turn, without looking at values.

    Raises:
        InvalidRequest: The shapes or types do not fit together.
    """
    check_blocks(blocks)
    check_tensors(slots=slots)
    if not isinstance(angles, Rotary):
        raise InvalidRequest(f"angles are a {type(angles).__name__}, not a Rotary")
    if isinstance(delta, bool) or not isinstance(delta, int) or abs(delta) > LONGEST:
        raise InvalidRequest(f"delta is {shown(delta)}, not an integer of at most {LONGEST}")
    if slots.dim() != 1 or not blocks.is_contiguous():
        raise InvalidRequest(
            f"slots {list(slots.shape)} of blocks {list(blocks.shape)}: not [n] and contiguous "
            "[num_layers, 2, num_blocks, block_size, kv_heads, head_dim]"
        )
    if slots.device != blocks.device:
        raise InvalidRequest(f"slots on {slots.device}, the blocks on {blocks.device}")
    check_apart("blocks", blocks, slots=slots)
    if slots.dtype != torch.int64 or blocks.dtype not in NUMBERS:
        raise InvalidRequest(
            f"slots of {slots.dtype} and blocks of {blocks.dtype}: not torch.int64 and keys of at "
            "least 16 bit (a turned eight-bit key would be rounded twice)"
        )
    if 2 * len(angles.frequencies) > blocks.shape[5]:
        raise InvalidRequest(
            f"{len(angles.frequencies)} pairs to turn in heads of {blocks.shape[5]}"
        )
