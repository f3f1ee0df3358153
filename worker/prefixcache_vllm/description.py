"""What vLLM would do with a command line: told before an engine is started, as one line of JSON.

    python -m prefixcache_vllm.description MODE MODEL [vLLM's arguments]

Run in a process of its own, since vLLM is imported, and its platform looked for, once and for all.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

from prefixcache.errors import CacheError, Unsupported
from prefixcache.plain_json import json_text
from prefixcache_vllm import pages
from prefixcache_vllm.options import Options


def describe(model: str, arguments: list[str], *, in_place: bool) -> dict[str, Any]:
    """Tell the pool's layout, the namespace and the scheduler that such an engine has.

    Raises:
        Unsupported: A model or settings that cannot be served; all settings are named.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    parsed = parser.parse_args(["--model", model, *arguments])
    made = AsyncEngineArgs.from_cli_args(parsed)
    config = made.create_engine_config(UsageContext.OPENAI_API_SERVER)
    pages.check(config, in_place=in_place)
    layout = pages.layout_of(config, expected_cache(config))
    return {
        "layout": str(layout),
        "model": pages.model_of(config, Options.of(config).weights),
        "block_size": config.cache_config.block_size,
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "on_cpu": config.device_config.device_type == "cpu",
    }


def expected_cache(config: Any) -> Any:
    """Give what of vLLM's `KVCacheConfig` can be known without the model's weights.

    The engine itself looks again when it starts.

    Raises:
        Unsupported: The model keeps another KV than full attention's.
    """
    from vllm.config import set_current_vllm_config
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.attention.selector import get_attn_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    model, cache = config.model_config, config.cache_config
    for what, found in (
        ("latent attention", model.use_mla),
        ("layers that keep states", model.is_hybrid or model.is_attention_free),
        ("a sliding window", model.get_sliding_window()),
        (
            "layers without KV of their own",
            getattr(model.hf_text_config, "num_kv_shared_layers", 0),
        ),
    ):
        if found:
            raise Unsupported(f"the model has {what}: its KV cannot be shared yet")
    spec = FullAttentionSpec(
        block_size=cache.block_size,
        num_kv_heads=model.get_num_kv_heads(config.parallel_config),
        head_size=model.get_head_size(),
        dtype=kv_cache_dtype_str_to_dtype(cache.cache_dtype, model),
        kv_quant_mode=get_kv_quant_mode(cache.cache_dtype),
    )
    with set_current_vllm_config(config):
        backend = get_attn_backend(spec.head_size, model.dtype, cache.cache_dtype)
    orders = backend.supported_kv_cache_layouts()
    if not orders:
        raise Unsupported(f"{backend.get_name()} does not say in which order it keeps KV")
    steps = [getattr(size, "base", size) for size in backend.get_supported_kernel_block_sizes()]
    if not any(spec.block_size % step == 0 for step in steps):
        raise Unsupported(
            f"--block-size {spec.block_size}: {backend.get_name()} takes multiples of "
            f"{' or '.join(map(str, sorted(steps)))}"
        )
    layers = range(model.get_num_layers(config.parallel_config))
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=layers)],
        kv_cache_layout=os.environ.get("VLLM_KV_CACHE_LAYOUT") or orders[0].name,
    )


def reason_of(error: Exception) -> str:
    r"""Say in one line why vLLM does not take what it was told.

    >>> reason_of(ValueError("no such model: m\nsee the documentation"))
    'no such model: m'
    """
    told = getattr(error, "errors", None)  # pydantic's
    if callable(told):
        return "; ".join(str(one["msg"]) for one in told())
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def main() -> None:
    """Answer on stdout; what vLLM prints goes to stderr."""
    mode, model, *arguments = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        told = describe(model, arguments, in_place=mode == "in-place")
    except CacheError as error:
        told = {"refused": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever vLLM says of what it was told
        told = {"failed": reason_of(error)}
    answers.write(json_text(told) + "\n")
    answers.close()


if __name__ == "__main__":
    main()
