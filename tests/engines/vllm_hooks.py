"""What is taken from the inside of vLLM: the signature and a digest of the source of each hook.

    .venv-vllm/bin/python tests/engines/vllm_hooks.py > tests/engines/vllm_hooks.json

Run by the Python of an environment with vLLM.  Where the file differs from what is there, somebody
reads what has changed before the file is written anew.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from importlib import import_module
from typing import Any

CORE = "vllm.v1.core."
HOOKS = {
    CORE + "kv_cache_manager": (
        "KVCacheBlocks",
        "KVCacheManager.__init__",
        "KVCacheManager.allocate_slots",
        "KVCacheManager.cache_blocks",
        "KVCacheManager.estimate_cached_tokens",
        "KVCacheManager.evict_blocks",
        "KVCacheManager.free",
        "KVCacheManager.get_block_ids",
        "KVCacheManager.get_blocks",
        "KVCacheManager.get_computed_blocks",
        "KVCacheManager.get_computed_blocks_for_connector",
        "KVCacheManager.make_prefix_cache_stats",
        "KVCacheManager.new_step_starts",
        "KVCacheManager.pop_blocks_for_free",
        "KVCacheManager.prefix_cache_lookup_enabled",
        "KVCacheManager.record_blocks_for_zeroing",
        "KVCacheManager.record_prefix_cache_stats",
        "KVCacheManager.remove_skipped_blocks",
        "KVCacheManager.reset_prefix_cache",
        "KVCacheManager.take_boundary_state_offloads",
        "KVCacheManager.take_events",
        "KVCacheManager.take_kv_cache_block_copies",
        "KVCacheManager.take_new_block_ids",
        "KVCacheManager.usage",
    ),
    CORE + "kv_cache_utils": ("KVCacheBlock", "KVCacheBlockCopy"),
    CORE + "sched.scheduler": (
        "Scheduler.__init__",
        "Scheduler._drain_deferred_frees",
        "Scheduler._free_cow_retained_blocks",
        "Scheduler._free_request_blocks",
        "Scheduler._handle_blocked_waiting_request",
        "Scheduler._handle_invalid_blocks",
        "Scheduler._preempt_request",
        "Scheduler._request_blocks_can_be_freed",
        "Scheduler._update_after_schedule",
        "Scheduler.add_request",
        "Scheduler.finish_requests",
        "Scheduler.reset_prefix_cache",
        "Scheduler.schedule",
        "Scheduler.shutdown",
        "Scheduler.update_from_output",
    ),
    CORE + "sched.async_scheduler": ("AsyncScheduler",),
    CORE + "sched.interface": ("PauseState",),
    CORE + "sched.request_queue": ("SchedulingPolicy",),
    CORE + "sched.output": ("KVConnectorBlockState", "SchedulerOutput"),
    "vllm.v1.request": ("Request", "RequestStatus"),
    "vllm.v1.outputs": ("KVConnectorOutput", "ModelRunnerOutput"),
    "vllm.v1.engine.core": ("EngineCore._initialize_kv_caches", "EngineCore.step"),
    "vllm.v1.kv_cache_interface": (
        "AttentionSpec",
        "FullAttentionSpec",
        "KVCacheConfig",
        "KVCacheTensor",
        "create_kv_cache_views",
        "get_kv_quant_mode",
    ),
    "vllm.v1.attention.backends.cpu_attn": ("_get_attn_isa",),
    "vllm.v1.worker.utils": ("allocate_kv_cache",),
    "vllm.v1.worker.cpu_worker": (
        "CPUWorker.__init__",
        "CPUWorker._should_warm_up_model",
        "CPUWorker.determine_available_memory",
    ),
    "vllm.v1.worker.gpu_worker": (
        "Worker.determine_available_memory",
        "Worker.execute_model",
        "Worker.get_kv_cache_spec",
        "Worker.initialize_from_config",
        "Worker.shutdown",
    ),
    "vllm.v1.worker.kv_connector_model_runner_mixin": ("KVConnectorModelRunnerMixin",),
    "vllm.distributed.kv_transfer.kv_connector.v1.base": (
        "KVConnectorBase_V1",
        "KVConnectorMetadata",
        "KVConnectorRole",
        "KVConnectorWorkerMetadata",
        "SupportsHMA",
    ),
    "vllm.distributed.kv_transfer.kv_connector.factory": ("KVConnectorFactory",),
    "vllm.multimodal.inputs": ("MultiModalFeatureSpec", "PlaceholderRange"),
    "vllm.engine.arg_utils": (
        "AsyncEngineArgs.from_cli_args",
        "AsyncEngineArgs.create_engine_config",
    ),
    "vllm.entrypoints.launchers.cli_args": ("make_arg_parser",),
    "vllm.utils.torch_utils": ("kv_cache_dtype_str_to_dtype",),
    "vllm.v1.attention.selector": ("get_attn_backend",),
    "vllm.v1.attention.backend": (
        "AttentionBackend.get_supported_kernel_block_sizes",
        "MultipleOf",
    ),
}


def told_of(thing: Any) -> dict[str, str]:
    """Give the signature and the digest of something."""
    thing = thing.fget if isinstance(thing, property) else inspect.unwrap(thing)
    try:
        signature = re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(thing)))
    except (TypeError, ValueError):
        signature = ""
    digest = hashlib.blake2b(inspect.getsource(thing).encode(), digest_size=8).hexdigest()
    return {"signature": signature, "source": digest}


def hooks() -> dict[str, Any]:
    """Give all of them, by name; one that is not there is None."""
    found: dict[str, Any] = {}
    for module, names in HOOKS.items():
        inside = import_module(module)
        for name in names:
            thing: Any = inside
            for part in name.split("."):
                thing = getattr(thing, part, None)
            found[f"{module}.{name}"] = None if thing is None else told_of(thing)
    return found


def main() -> None:
    """Print them."""
    import vllm

    told = {"version": vllm.__version__.partition("+")[0], "hooks": hooks()}
    json.dump(told, sys.stdout, indent=1, sort_keys=True)  # what this prints is compared, as it is
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
