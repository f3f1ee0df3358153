"""Any Hugging Face decoder on paged keys and values, through the library's own attention registry.

```
model(input_ids [1, T], position_ids [1, T], use_cache=False)
  each layer:  q, k, v ──► paged attention ──► out       k, v go to the pool's slots first
                                │ context: which batch, which pool   (a ContextVar:
                                          some models drop unknown keyword arguments)
```
No mask is ever built: causality, windows and lengths follow from the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody knows
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from prefixcache.errors import Unsupported
from prefixcache.types import Layout
from prefixcache_kernels import shared_prefix_attention, store_kv
from prefixcache_kernels.pool import SharedPool
from prefixcache_worker.batch import Batch
from prefixcache_worker.reach import windows

ATTENTION: Final = "prefixcache_paged"
"""Name under which the paged attention is registered with transformers."""


@dataclass(slots=True)
class Call:
    """What one layer asked of attention."""

    num_kv_heads: int
    head_dim: int
    window: int | None


@dataclass(slots=True)
class Context:
    """What attention needs to know beside queries, keys and values.

    Without a pool, attention runs over the batch alone and only notes what it was asked for: so the
    layout of a model is learnt.
    """

    batch: Batch | None = None
    pool: SharedPool | None = None
    plan: Any = None
    calls: dict[int, list[Call]] = field(default_factory=dict)
    """By layer, in order; one each is what a decoder makes."""


_CONTEXT: ContextVar[Context] = ContextVar("prefixcache_attention")


@contextmanager
def attending(context: Context) -> Iterator[Context]:
    """Use `context` for all attention inside the `with` block."""
    token = _CONTEXT.set(context)
    try:
        yield context
    finally:
        _CONTEXT.reset(token)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **ignored: object,
) -> tuple[Tensor, None]:
    """Store the new keys and values and attend over each sequence's blocks.

    Args:
        module: the attention layer; names its place.
        query: `[1, Hq, T, D]`, rotated.
        key: `[1, Hkv, T, D]`, rotated.
        value: `[1, Hkv, T, Dv]`, Dv at most D.
        attention_mask: always None.
        scaling: of the scores; 1/sqrt(D) by default.
        sliding_window: tokens that a query sees, its own included.
        softcap: bound of the scores.
        s_aux: learnt sinks, `[Hq]`.
        ignored: what other implementations need.

    Returns:
        `[1, T, Hq, Dv]`, and no weights.
    """
    context = _CONTEXT.get()
    layer = int(module.layer_idx)
    width = value.shape[-1]
    call = Call(key.shape[1], max(key.shape[-1], width), sliding_window)
    context.calls.setdefault(layer, []).append(call)
    if context.batch is None or context.pool is None:
        # Only shapes are asked for; the numbers are compared later, on the pool.
        groups = query.shape[1] // key.shape[1]
        return value.repeat_interleave(groups, dim=1).transpose(1, 2), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    new_values = value[0].transpose(0, 1)
    if width < key.shape[-1]:  # latent attention: values are narrower than keys
        new_values = F.pad(new_values, (0, key.shape[-1] - width))
    keys, values = context.pool.keys(layer), context.pool.values(layer)
    batch = context.batch
    store_kv(
        key[0].transpose(0, 1).to(keys.dtype),
        new_values.to(values.dtype),
        keys,
        values,
        batch.slot_mapping,
    )
    out = shared_prefix_attention(
        query[0].transpose(0, 1),
        keys,
        values,
        batch.block_tables,
        batch.query_start,
        batch.context_lens,
        batch.groups,
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        plan=context.plan,
    )
    return out[None, ..., :width], None


def _no_mask(*args: object, **kwargs: object) -> None:
    """Tell transformers that attention needs no mask."""


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, _no_mask)


class HuggingFaceNetwork:
    """A loaded `AutoModelForCausalLM` that attends through `attend`.

    Args:
        module: the model, in evaluation mode.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        module.set_attn_implementation(ATTENTION)

    def learn_layout(self, dtype: str) -> Layout:
        """Run a few tokens through the model and see what its attention stores.

        Raises:
            Unsupported: not every layer attends exactly once through the registry, or layers
                differ in shape, or a window that the config names does not reach attention.
        """
        config = self.module.config.get_text_config()
        name = config.model_type
        ids = torch.arange(1, 5)[None]
        with attending(Context()) as context, torch.inference_mode():
            self.module(input_ids=ids, position_ids=ids - 1, use_cache=False)
        num_layers = config.num_hidden_layers
        counts = [len(context.calls.get(layer, ())) for layer in range(num_layers)]
        if counts != [1] * num_layers or len(context.calls) != num_layers:
            raise Unsupported(
                f"architecture {name!r} does not attend through transformers' attention registry "
                f"once a layer: of {num_layers} layers {counts.count(1)} did; it keeps keys and "
                f"values of its own, which no pool can share"
            )
        calls = [context.calls[layer][0] for layer in range(num_layers)]
        shapes = {(call.num_kv_heads, call.head_dim) for call in calls}
        if len(shapes) != 1:
            raise Unsupported(
                f"architecture {name!r} has layers of different shapes (heads, width): "
                f"{sorted(shapes)}; a pool holds one"
            )
        for layer, (call, window) in enumerate(zip(calls, windows(config), strict=True)):
            if call.window != window:
                raise Unsupported(
                    f"architecture {name!r}: the config gives layer {layer} a window of {window} "
                    f"tokens, but its attention asks for {call.window}"
                )
        heads, width = shapes.pop()
        return Layout(num_layers, heads, width, dtype)

    def __call__(self, batch: Batch, pool: SharedPool, plan: Any) -> Tensor:
        """Run a batch: fill its slots of the pool, give float32 logits `[R, vocab]`."""
        with attending(Context(batch, pool, plan)), torch.inference_mode():
            out = self.module(
                input_ids=batch.tokens[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=batch.rows,
            )
        logits: Tensor = out.logits[0].float()
        return logits
