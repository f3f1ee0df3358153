"""vLLM behind a pipe: it answers lines of JSON on standard input with lines on standard output.

    PYTHON -P vllm_engine.py '{"model": "folder", "dtype": "bfloat16", …}'

Run by the Python that has vLLM, which need not be the one that has prefixcache: nothing is imported
here but vLLM and the standard library.  The first line says what runs; then each line
`{"prompts": [[1, 2]], "count": 5}` is generated as one batch and answered with what vLLM itself
counted and timed of each request, and a line `{"counts": true}` with the steps that its scheduler
has planned, the blocks of KV that its own cache has and, if it leases its blocks, with what it has
asked the service.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def told(output: Any) -> dict[str, Any]:
    """Give what vLLM counted of one request, and its times in seconds of one monotonic clock.

    Args:
        output: vLLM's RequestOutput, with the metrics that `disable_log_stats=False` adds.
    """
    times = output.metrics
    return {
        "prompt": len(output.prompt_token_ids),
        "cached": output.num_cached_tokens,
        "generated": len(output.outputs[0].token_ids),
        "queued_s": times.queued_ts if times else None,
        "first_s": times.first_token_ts if times else None,
        "last_s": times.last_token_ts if times else None,
    }


class Steps:
    """Counts the steps that a scheduler plans, idle ones apart."""

    def __init__(self, scheduler: Any) -> None:
        self._plan = scheduler.schedule
        self._scheduler = scheduler
        self.steps = 0
        scheduler.schedule = self.schedule

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plan a step."""
        output = self._plan(*args, **kwargs)
        self.steps += bool(output.total_num_scheduled_tokens)
        return output

    def told(self) -> dict[str, int]:
        """Give the steps, the blocks of its own cache, what was asked of the service meanwhile."""
        found = {"steps": self.steps}
        manager = getattr(self._scheduler, "kv_cache_manager", None)
        kept = getattr(getattr(manager, "block_pool", None), "cached_block_hash_to_block", None)
        if kept is not None:
            found["kv_blocks"] = len(kept)
        connector = getattr(self._scheduler, "connector", None)
        side = getattr(connector, "_scheduler", None) or self._scheduler
        leases = getattr(side, "leases", None)
        if leases is not None:
            found |= {name: getattr(leases.counts, name) for name in leases.counts.__slots__}
        return found


def main() -> None:
    """Load the model and answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM writes its log where the answers go
    encoder = json.JSONEncoder(allow_nan=False)
    vllm: Any = importlib.import_module("vllm")
    torch: Any = importlib.import_module("torch")
    peer = vllm.LLM(**json.loads(sys.argv[1]))
    config = peer.llm_engine.vllm_config
    steps = Steps(peer.llm_engine.engine_core.engine_core.scheduler)
    about = {
        "version": vllm.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiled": not config.model_config.enforce_eager,
        "block_size": config.cache_config.block_size,
    }
    print(encoder.encode(about), file=answers, flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        if "counts" in ask:
            print(encoder.encode(steps.told()), file=answers, flush=True)
            continue
        settings = vllm.SamplingParams(
            max_tokens=ask["count"], temperature=0.0, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in ask["prompts"]]
        outputs = peer.generate(prompts, settings, use_tqdm=False)
        print(encoder.encode([told(one) for one in outputs]), file=answers, flush=True)
    peer.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
