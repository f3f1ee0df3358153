"""The lean network in C: weights packed, each layer one call, x in float32 from end to end.

```
embedding ──► layer, layer, ... (prefixcache_kernels.cpu.layers) ──► norm + head ──► logits, float32
weights: packed tensors by name, in memory or of a file that all workers map (`weights`)
```

A row of its products has the same bits alone and beside others, in a prompt and in a step that
decodes.  What it is compared with before it is used: see `model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody knows
from torch import Tensor

from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache_kernels import GroupedPlan
from prefixcache_kernels.cpu.attend import MAX_DIM, MAX_GROUP
from prefixcache_kernels.cpu.layers import Layers, LayerWeights, Rotation, Sizes
from prefixcache_kernels.cpu.linear import Matrix, in_panels, pack, quantize
from prefixcache_kernels.pool import SharedPool
from prefixcache_worker.batch import Batch
from prefixcache_worker.lean import understands
from prefixcache_worker.reach import windows

TYPES: Final = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a network is beside its weights; as JSON in the head of a file of weights."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    width: int
    vocab: int
    eps: float
    scale: float
    rope_scale: float
    windows: tuple[int | None, ...]

    def fields(self) -> dict[str, Any]:
        """Give them as JSON takes them."""
        return asdict(self)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Facts:
        """Read them back."""
        return cls(**{**fields, "windows": tuple(fields["windows"])})


def facts_of(module: Any) -> Facts:
    """Give what the config of a loaded model of this family says."""
    config, base = module.config, module.model
    attention = base.layers[0].self_attn
    return Facts(
        num_layers=len(base.layers),
        num_heads=int(config.num_attention_heads),
        num_kv_heads=int(config.num_key_value_heads),
        head_dim=int(attention.head_dim),
        hidden=int(config.hidden_size),
        width=int(config.intermediate_size),
        vocab=int(config.vocab_size),
        eps=float(config.rms_norm_eps),
        scale=float(attention.scaling),
        rope_scale=float(base.rotary_emb.attention_scaling),
        windows=tuple(windows(config)),
    )


def pack_module(module: Any) -> dict[str, Tensor]:
    """Pack the weights of a loaded model, by name.  Takes as much memory again.

    Raises:
        Unsupported: they are of a size or type that is not packed.
    """
    base = module.model
    made = {
        "embedding": base.embed_tokens.weight.detach().contiguous(),
        "norm": base.norm.weight.detach().float(),
        "inv_freq": base.rotary_emb.inv_freq.float(),
        "head": pack(module.lm_head.weight.detach()),
    }
    for index, layer in enumerate(base.layers):
        attention, mlp = layer.self_attn, layer.mlp
        made |= {
            f"{index}.input_norm": layer.input_layernorm.weight.detach().float(),
            f"{index}.post_norm": layer.post_attention_layernorm.weight.detach().float(),
        }
        for name in ("q_norm", "k_norm"):
            if (norm := getattr(attention, name, None)) is not None:
                made[f"{index}.{name}"] = norm.weight.detach().float()
        for name, parts in (
            ("qkv", (attention.q_proj, attention.k_proj, attention.v_proj)),
            ("out", (attention.o_proj,)),
            ("gate_up", (mlp.gate_proj, mlp.up_proj)),
            ("down", (mlp.down_proj,)),
        ):
            gated = name == "gate_up"
            weight = torch.cat([part.weight.detach() for part in parts])
            made[f"{index}.{name}"] = pack(weight, gated=gated)
            if parts[0].bias is not None:
                bias = torch.cat([part.bias.detach() for part in parts]).float()
                made[f"{index}.{name}.bias"] = in_panels(bias, gated=gated).flatten()
    return made


class NativeNetwork:
    """A model of Llama's family on packed weights.

    Args:
        facts: of the model.
        weights: its packed tensors by name; kept, never changed.

    Raises:
        InvalidRequest: tensors are missing, or do not fit the facts or each other.
        Unsupported: sizes that the C library does not take.
    """

    def __init__(self, facts: Facts, weights: Mapping[str, Tensor]) -> None:
        if facts.head_dim > MAX_DIM or facts.num_heads > MAX_GROUP * facts.num_kv_heads:
            raise Unsupported(
                f"{facts.num_heads} heads of {facts.head_dim} on {facts.num_kv_heads}: the C "
                f"library takes {MAX_DIM} and groups of {MAX_GROUP}"
            )
        if len(facts.windows) != facts.num_layers:
            raise InvalidRequest(f"{len(facts.windows)} windows of {facts.num_layers} layers")
        self.facts = facts
        self.weights = dict(weights)
        hidden, kv = facts.hidden, facts.num_heads + 2 * facts.num_kv_heads
        try:
            self.embedding = weights["embedding"]
            self._norm, self._inv_freq = weights["norm"], weights["inv_freq"]
            self._head = Matrix(weights["head"], hidden, facts.vocab)
            layers = [
                LayerWeights(
                    qkv=self._matrix(f"{i}.qkv", hidden, kv * facts.head_dim),
                    out=self._matrix(f"{i}.out", facts.num_heads * facts.head_dim, hidden),
                    gate_up=self._matrix(f"{i}.gate_up", hidden, facts.width, gated=True),
                    down=self._matrix(f"{i}.down", facts.width, hidden),
                    input_norm=weights[f"{i}.input_norm"],
                    post_norm=weights[f"{i}.post_norm"],
                    q_norm=weights.get(f"{i}.q_norm"),
                    k_norm=weights.get(f"{i}.k_norm"),
                    window=facts.windows[i],
                )
                for i in range(facts.num_layers)
            ]
        except KeyError as missing:
            raise InvalidRequest(f"no weights are called {missing}") from None
        if self.embedding.shape != (facts.vocab, hidden) or self.embedding.dtype not in TYPES:
            raise InvalidRequest(f"an embedding {list(self.embedding.shape)} of {facts.vocab}")
        if self._norm.shape != (hidden,) or self._inv_freq.shape != (facts.head_dim // 2,):
            raise InvalidRequest("the norm or the rotation is of another size than the model")
        self._layers = Layers(
            layers,
            Sizes(
                hidden=hidden,
                width=facts.width,
                heads=facts.num_heads,
                kv_heads=facts.num_kv_heads,
                dim=facts.head_dim,
                eps=facts.eps,
                scale=facts.scale,
            ),
        )

    @classmethod
    def of(cls, module: Any) -> NativeNetwork | None:
        """Pack a loaded model; None if it holds anything that is not restated here, or in C."""
        if not understands(module):
            return None
        try:
            return cls(facts_of(module), pack_module(module))
        except Unsupported:
            return None

    def first_layers(self, count: int) -> NativeNetwork:
        """Give a network of the first layers, on the same weights."""
        windows = self.facts.windows[:count]
        return NativeNetwork(replace(self.facts, num_layers=count, windows=windows), self.weights)

    def in_eight_bits(self) -> NativeNetwork:
        """Give this network with its matrices in eight bits; the embedding stays.  Takes seconds.

        Raises:
            Unsupported: weights are not finite.
        """
        weights = dict(self.weights)
        for name, matrix in self._matrices():
            weights[name] = quantize(matrix.unpacked(), gated=matrix.gated)
        return NativeNetwork(self.facts, weights)

    def _matrices(self) -> Iterator[tuple[str, Matrix]]:
        yield "head", self._head
        for index, layer in enumerate(self._layers.layers):
            for name in ("qkv", "out", "gate_up", "down"):
                yield f"{index}.{name}", getattr(layer, name)

    def __call__(self, batch: Batch, pool: SharedPool, plan: Any) -> Tensor:
        """Run a batch: fill its slots of the pool, give float32 logits `[R, vocab]`."""
        if plan is None:
            plan = GroupedPlan.build(
                batch.block_tables,
                batch.query_start,
                batch.context_lens,
                pool.block_size,
                batch.groups,
            )
        with torch.inference_mode():
            x = F.embedding(batch.tokens, self.embedding).float()
            layers = range(self.facts.num_layers)
            x = self._layers(
                x,
                self._rotation(batch.positions),
                batch.slot_mapping,
                [pool.keys(index) for index in layers],
                [pool.values(index) for index in layers],
                plan,
                batch.rows,
            )
            return self._head.multiply(x, norm=self._norm, eps=self.facts.eps)

    def _rotation(self, positions: Tensor) -> Rotation:
        """Cosines and sines of a step's positions."""
        return Rotation.of(positions, self._inv_freq, self.facts.rope_scale)

    def _matrix(self, name: str, inputs: int, columns: int, *, gated: bool = False) -> Matrix:
        bias = self.weights.get(f"{name}.bias")
        return Matrix(self.weights[name], inputs, columns, gated, bias)
