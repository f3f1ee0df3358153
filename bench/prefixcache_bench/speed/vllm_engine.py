"""vLLM behind a pipe: it answers lines of JSON on standard input with lines on standard output.

    PYTHON -P vllm_engine.py '{"model": "folder", "dtype": "bfloat16", …}'

Run by the Python that has vLLM, which need not be the one that has prefixcache: nothing is imported
here but vLLM and the standard library.  The first line says what runs; then each line
`{"prompts": [[1, 2]], "count": 5}` is generated as one batch and answered with what vLLM itself
counted and timed of each request.
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


def main() -> None:
    """Load the model and answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM writes its log where the answers go
    encoder = json.JSONEncoder(allow_nan=False)
    vllm: Any = importlib.import_module("vllm")
    torch: Any = importlib.import_module("torch")
    peer = vllm.LLM(**json.loads(sys.argv[1]))
    config = peer.llm_engine.vllm_config
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
        settings = vllm.SamplingParams(
            max_tokens=ask["count"], temperature=0.0, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in ask["prompts"]]
        outputs = peer.generate(prompts, settings, use_tqdm=False)
        print(encoder.encode([told(one) for one in outputs]), file=answers, flush=True)


if __name__ == "__main__":
    main()
