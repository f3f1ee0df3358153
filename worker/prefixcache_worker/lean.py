"""The lean network: Llama's family with fewer, larger and prepacked matrix products.

A decode step reads every weight once, so it should do little else.  Compared with the library's
modules:

```
q_proj k_proj v_proj      ──►  one product, weights reordered once for this CPU   (oneDNN)
gate_proj up_proj         ──►  one product, likewise
cos, sin                       once a step, for the batch's positions
~1,500 module calls            ~500 calls of operators
```
It takes its weights from a loaded Hugging Face model, and only from one whose config it understands
in full; at load its logits are compared with that model's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody knows
from torch import Tensor

from prefixcache_kernels import shared_prefix_attention, store_kv
from prefixcache_kernels.pool import SharedPool
from prefixcache_worker.batch import Batch
from prefixcache_worker.reach import windows

FAMILY: Final = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Model types whose forward pass this file restates, and the class that computes it."""

_STATIC_ROPE: Final = {"default", "linear", "llama3", "yarn"}
_TWIN_LAYERS: Final = 2
_TWIN_WIDTH: Final = 64
_TWIN_VOCAB: Final = 128
_EXPECTED_BATCH: Final = 8  # rows that the weights' order is chosen for; others work as well


class Linear:
    """A matrix product whose weight was reordered once for this CPU, where torch can do that.

    Args:
        weight: `[out, in]`.
        bias: `[out]` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight.contiguous()
        self.bias = bias
        self.packed = _pack(self.weight)
        if self.packed is not None:
            self.weight = self.weight.new_empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply `x [T, in]`; gives `[T, out]`."""
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def _pack(weight: Tensor) -> Tensor | None:
    """Reorder a weight for oneDNN; None where this build of torch or this CPU cannot."""
    if weight.dtype not in (torch.bfloat16, torch.float32) or weight.device.type != "cpu":
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_BATCH)
        one = weight.new_ones(1, weight.shape[1])
        torch.ops.mkldnn._linear_pointwise(one, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return packed


@dataclass(slots=True)
class _Layer:
    """Weights of one layer."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


def twin(module: Any) -> Any:
    """Make a small random float32 model of the same architecture and attention.

    What rounding would hide in a bfloat16 model shows in its twin: a wrong rotation or scale.
    """
    config = copy.deepcopy(module.config)
    config.num_hidden_layers = min(_TWIN_LAYERS, config.num_hidden_layers)
    config.intermediate_size, config.vocab_size = _TWIN_WIDTH, _TWIN_VOCAB
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    small = type(module)(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    for weight in small.parameters():
        if weight.dim() > 1:
            # Larger than usual, so that attention has a say in the logits.
            torch.nn.init.normal_(weight, std=1.5 * weight.shape[1] ** -0.5, generator=generator)
    return small


def understands(module: Any) -> bool:
    """Tell whether a loaded model's config holds nothing but what is restated here."""
    config = module.config
    rope = config.rope_parameters if hasattr(config, "rope_parameters") else None
    return (
        FAMILY.get(config.model_type) == type(module).__name__
        and getattr(config, "hidden_act", None) == "silu"
        and getattr(config, "quantization_config", None) is None
        and isinstance(rope, dict)
        and rope.get("rope_type", "default") in _STATIC_ROPE
        and float(rope.get("partial_rotary_factor", 1.0)) == 1.0
        and next(module.parameters()).device.type == "cpu"
    )


class LeanNetwork:
    """A model of Llama's family; make one with `LeanNetwork.of`.

    Args:
        module: the loaded model whose weights are taken.
    """

    def __init__(self, module: Any) -> None:
        config = module.config
        base = module.model
        attention = base.layers[0].self_attn
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(attention.head_dim)
        self.width = int(config.intermediate_size)
        self.eps = float(config.rms_norm_eps)
        self.scale = float(attention.scaling)
        self.inv_freq: Tensor = base.rotary_emb.inv_freq.float()
        self.rope_scale = float(base.rotary_emb.attention_scaling)
        self.embedding: Tensor = base.embed_tokens.weight.detach()
        self.norm: Tensor = base.norm.weight.detach()
        self.layers = [
            _layer(layer, window)
            for layer, window in zip(base.layers, windows(config), strict=True)
        ]
        self.head = Linear(module.lm_head.weight.detach())

    @classmethod
    def of(cls, module: Any) -> LeanNetwork | None:
        """Take over a loaded model; None if its config holds anything that is not restated here."""
        return cls(module) if understands(module) else None

    def first_layers(self, count: int) -> LeanNetwork:
        """Give a network of the first layers, on the same weights."""
        network = copy.copy(self)
        network.layers = self.layers[:count]
        return network

    def __call__(self, batch: Batch, pool: SharedPool, plan: Any) -> Tensor:
        """Run a batch: fill its slots of the pool, give float32 logits `[R, vocab]`."""
        with torch.inference_mode():
            return self._forward(batch, pool, plan)

    def _forward(self, batch: Batch, pool: SharedPool, plan: Any) -> Tensor:
        x = F.embedding(batch.tokens, self.embedding)
        cos, sin = self._rotation(batch.positions, x.dtype)
        size = (x.shape[-1],)
        heads, rotated = self.num_heads, self.num_heads + self.num_kv_heads
        half = self.head_dim // 2
        for index, layer in enumerate(self.layers):
            h = torch.rms_norm(x, size, layer.input_norm, self.eps)
            a = layer.qkv(h).view(x.shape[0], -1, self.head_dim)
            qk = self._normed(a[:, :rotated], layer)
            qk = torch.addcmul(qk * cos, torch.roll(qk, half, -1), sin)
            keys, values = pool.keys(index), pool.values(index)
            store_kv(qk[:, heads:], a[:, rotated:], keys, values, batch.slot_mapping)
            last = index == len(self.layers) - 1
            if last and not batch.rows.shape[0]:
                return x.new_empty(0, self.embedding.shape[0], dtype=torch.float32)
            attended = shared_prefix_attention(
                qk[:, :heads],
                keys,
                values,
                batch.block_tables,
                batch.query_start,
                batch.context_lens,
                batch.groups,
                scale=self.scale,
                window=layer.window,
                plan=plan,
            )
            if last:
                # Of the last layer only the rows that become logits go on.
                attended, x = attended[batch.rows], x[batch.rows]
            x = x + layer.out(attended.reshape(attended.shape[0], -1))
            h = torch.rms_norm(x, size, layer.post_norm, self.eps)
            m = layer.gate_up(h)
            x = x + layer.down(F.silu(m[:, : self.width]) * m[:, self.width :])
        return self.head(torch.rms_norm(x, size, self.norm, self.eps)).float()

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `[T, 1, D]`: `x * cos + roll(x) * sin` rotates `x`."""
        angles = torch.outer(positions.float(), self.inv_freq)
        cos, sin = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return cos.to(dtype)[:, None], sin.to(dtype)[:, None]

    def _normed(self, qk: Tensor, layer: _Layer) -> Tensor:
        """Normalise queries and keys per head, where the model does."""
        if layer.q_norm is None or layer.k_norm is None:
            return qk
        size = (self.head_dim,)
        q = torch.rms_norm(qk[:, : self.num_heads], size, layer.q_norm, self.eps)
        k = torch.rms_norm(qk[:, self.num_heads :], size, layer.k_norm, self.eps)
        return torch.cat([q, k], dim=1)


def _fused(*parts: Any) -> Linear:
    """Lay several linear modules with the same input one under the other."""
    biases = [part.bias.detach() for part in parts if part.bias is not None]
    weight = torch.cat([part.weight.detach() for part in parts])
    return Linear(weight, torch.cat(biases) if biases else None)


def _layer(layer: Any, window: int | None) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return _Layer(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=_fused(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=None if q_norm is None else q_norm.weight.detach(),
        k_norm=None if k_norm is None else k_norm.weight.detach(),
        out=_fused(attention.o_proj),
        post_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_fused(mlp.gate_proj, mlp.up_proj),
        down=_fused(mlp.down_proj),
        window=window,
    )
