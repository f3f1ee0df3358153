"""How vLLM's KV cache lies, in the pool's words: which `Layout` it has, and what has none.

```
vLLM     one allocation; of each layer a view [block, head, slot, keys | values], in six orders
pool     planes of pages; the service asks no more
LBHNC    a plane per layer             LHBNC    a plane per layer and head
BLHNC    one plane: a page is a block of all layers
```
What lies inside of a page is vLLM's own, and changes with its version, the backend and the
instructions of the CPU: all of these are in the format's name, so that two processes that would
read each other's bytes in different ways never share a pool.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixcache.errors import Unsupported
from prefixcache.plain_json import json_text
from prefixcache.types import Layout


def only_spec(kv_cache_config: Any) -> Any:
    """Give the specification of all layers' KV, where there is one that a tree of tokens describes.

    Raises:
        Unsupported: Groups, windows or states that it does not describe; by name.
    """
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if kinds != ["FullAttentionSpec"]:
        raise Unsupported(
            f"the model's KV is {', '.join(kinds) or 'nothing'}: only one group of full attention "
            "can be shared, whose every token keeps one entry in every layer"
        )
    spec = groups[0].kv_cache_spec
    for what, found in (
        ("a sliding window", spec.sliding_window),
        ("attention in chunks", spec.attention_chunk_size),
        ("attention that is not causal", spec.non_causal),
        ("pages that are padded", spec.page_size_padded),
        ("several tokens in one state", spec.tokens_per_state != 1),
    ):
        if found:
            raise Unsupported(f"the model has {what} ({found}): its KV cannot be shared yet")
    if spec.kv_quant_mode.name != "NONE":
        raise Unsupported(
            f"KV in {spec.kv_quant_mode.name} has scales outside of its blocks, which others do "
            "not have: start vLLM with --kv-cache-dtype auto"
        )
    return spec


def refusals(vllm_config: Any, *, in_place: bool) -> Iterator[str]:
    """Say, one by one, which of vLLM's settings cannot go with a shared pool."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        yield "speculative decoding writes ahead of what is decided: leave --speculative-config out"
    if model.is_encoder_decoder:
        yield "models with an encoder and a decoder keep KV that no tokens name"
    if model.runner_type != "generate":
        yield f"--runner {model.runner_type} keeps no KV between requests"
    if model.enable_prompt_embeds:
        yield "prompts given as embeddings have no tokens: leave --enable-prompt-embeds out"
    for flag in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, flag, 1) != 1:
            option = flag.replace("_", "-")
            yield f"--{option} {getattr(parallel, flag)}: one engine of one rank is served"
    if in_place and model.enable_sleep_mode:
        yield "--enable-sleep-mode gives memory away that others read"
    if in_place and vllm_config.kv_transfer_config is not None:
        yield "--kv-transfer-config beside in-place mode: one of the two"


def check(vllm_config: Any, *, in_place: bool) -> None:
    """Refuse settings that cannot go with a shared pool, all in one message.

    Raises:
        Unsupported: As said.
    """
    found = list(refusals(vllm_config, in_place=in_place))
    if found:
        raise Unsupported("prefixcache cannot serve this engine: " + "; ".join(found))


def layout_of(vllm_config: Any, kv_cache_config: Any) -> Layout:
    """Give the layout that the pool must have.

    Raises:
        Unsupported: `only_spec`'s.
    """
    spec = only_spec(kv_cache_config)
    num_layers = len(kv_cache_config.kv_cache_groups[0].layer_names)
    order = str(kv_cache_config.kv_cache_layout)
    num_planes = num_planes_of(order, num_layers, spec.num_heads)
    return Layout(
        planes=num_planes,
        page_bytes=num_layers * spec.page_size_bytes // num_planes,
        format=format_of(vllm_config, spec, order),
    )


def num_planes_of(order: str, num_layers: int, num_heads: int) -> int:
    """Count the runs of neighbouring blocks in vLLM's order of layers, blocks, heads, slots, parts.

    Raises:
        Unsupported: The letters are others than those.
    """
    sizes = {"L": num_layers, "H": num_heads}
    before = order.partition("B")[0]
    if sorted(order) != sorted("LBHNC") or not sizes.keys() >= set(before):
        raise Unsupported(f"vLLM's order of KV is {order}, which this version does not know")
    return math.prod(sizes[letter] for letter in before)


def format_of(vllm_config: Any, spec: Any, order: str) -> str:
    """Name what must be equal for two processes to read each other's pages."""
    from vllm.platforms import current_platform
    from vllm.version import __version__

    release = ".".join(__version__.split(".")[:2])
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        dtype = vllm_config.model_config.dtype
        reader = f"cpu-{_get_attn_isa(dtype, spec.block_size, spec.head_size, 'auto')}"
    else:
        backend = vllm_config.attention_config.backend
        reader = f"{current_platform.device_name}-{backend.name if backend else 'auto'}"
    name = str(spec.dtype).removeprefix("torch.")
    heads = f"{spec.num_kv_heads}x{spec.head_size}+{spec.head_size_v}"
    return f"vllm-{release}/{order}/{reader}/{heads}/{name}".replace(" ", "-")


def model_of(vllm_config: Any, weights: str = "") -> str:
    """Name the weights and all that decides which keys and values a token gets.

    Of the model's configuration a digest, overrides included; not what vLLM makes room for, such as
    the longest request.
    """
    model = vllm_config.model_config
    name = str(Path(model.model).resolve()) if Path(model.model).is_dir() else model.model
    parts = (name, model.revision, model.quantization, model.dtype, weights)
    told = [str(part).removeprefix("torch.") for part in parts if part]
    settings = {
        name: value
        for name, value in model.hf_config.to_dict().items()
        if name != "transformers_version" and not name.startswith("_")
    }
    digest = hashlib.sha256(json_text(settings, sort_keys=True, default=str).encode())
    return f"{'@'.join(told)}#{digest.hexdigest()[:16]}"
