"""Other libraries' paged decode, on the same batch: each prepares a call, if it is installed."""

# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-call"

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from prefixcache.errors import Unsupported
from prefixcache_bench.speed.kernel_batch import Batch

Call = Callable[[], Tensor]


def flashinfer(batch: Batch) -> Call:
    """FlashInfer's decode wrapper; planning is not timed."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    device = batch.query.device
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    size, width = batch.block_size, batch.block_tables.shape[1]
    num_seqs = len(batch.contexts)
    wrapper.plan(
        torch.arange(0, num_seqs + 1, dtype=torch.int32) * width,
        batch.block_tables.flatten(),
        torch.tensor([(n - 1) % size + 1 for n in batch.contexts], dtype=torch.int32),
        *(batch.heads.query, batch.heads.key, batch.heads.dim, size),
        q_data_type=batch.query.dtype,
        kv_data_type=batch.key_cache.dtype,
    )
    return lambda: wrapper.run(batch.query, (batch.key_cache, batch.value_cache))


def vllm_triton(batch: Batch) -> Call:
    """The unified Triton kernel of vLLM, with its split over keys where it takes one."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    out = torch.empty_like(batch.query)
    device, heads = batch.query.device, batch.heads
    one = torch.ones(1, device=device)
    given: dict[str, Any] = {
        "q": batch.query,
        "k": batch.key_cache,
        "v": batch.value_cache,
        "out": out,
        "cu_seqlens_q": batch.query_start,
        "max_seqlen_q": 1,
        "seqused_k": batch.context_lens,
        "max_seqlen_k": max(batch.contexts),
        "softmax_scale": heads.scale,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": batch.block_tables,
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": one,
        "v_descale": one,
    }
    if "seq_threshold_3D" in inspect.signature(unified_attention).parameters:
        # What its backend does: 16 segments up to as many sequences as keep 128 programs busy.
        threshold, segments = 128 // heads.key, 16
        shape = (threshold, heads.query, segments)
        given |= {
            "seq_threshold_3D": threshold,
            "num_par_softmax_segments": segments,
            "softmax_segm_output": torch.empty(*shape, heads.dim, device=device),
            "softmax_segm_max": torch.empty(shape, device=device),
            "softmax_segm_expsum": torch.empty(shape, device=device),
        }

    def call() -> Tensor:
        unified_attention(**given)
        return out

    return call


def torch_varlen(batch: Batch) -> Call:
    """Torch's own attention over a block table."""
    from torch.nn.attention.varlen import varlen_attn

    if "block_table" not in inspect.signature(varlen_attn).parameters:
        raise Unsupported("this torch's varlen_attn takes no block_table")
    starts = torch.zeros_like(batch.query_start)
    starts[1:] = batch.context_lens.cumsum(0)
    given: dict[str, Any] = {
        "scale": batch.heads.scale,
        "enable_gqa": True,
        "seqused_k": batch.context_lens,
        "block_table": batch.block_tables,
    }
    args = (batch.query, batch.key_cache, batch.value_cache, batch.query_start, starts)
    most = max(batch.contexts)

    def call() -> Tensor:
        answer = varlen_attn(*args, 1, most, **given)
        assert isinstance(answer, Tensor)
        return answer

    return call


def flex_attention(batch: Batch) -> Call:
    """FlexAttention, compiled, on contiguous keys: it knows no block tables of this form."""
    from torch.nn.attention.flex_attention import flex_attention

    pairs = [batch.dense(row) for row in range(len(batch.contexts))]
    key, value = (torch.stack(side).transpose(1, 2) for side in zip(*pairs, strict=True))
    query = batch.query[:, :, None]
    compiled = torch.compile(flex_attention)
    return lambda: compiled(query, key, value, scale=batch.heads.scale, enable_gqa=True)


DECODE: Final[dict[str, Callable[[Batch], Call]]] = {
    "flashinfer": flashinfer,
    "vllm triton": vllm_triton,
    "torch varlen_attn": torch_varlen,
    "flex_attention": flex_attention,
}
