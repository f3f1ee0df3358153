"""vLLM behind a pipe: it answers lines of JSON on standard input with lines on standard output.

    PYTHON -P vllm_engine.py '{"model": "folder", "dtype": "bfloat16", …}'

Run by the Python that has vLLM, which need not be the one that has prefixcache: nothing is imported
here but vLLM and the standard library.  The first line says what runs; then each line
`{"prompts": [[1, 2]], "count": 5}` is generated as one batch and answered with what vLLM itself
counted and timed of each request, and a line `{"counts": true}` with the steps that its scheduler
has planned, the requests that it preempted, the blocks of KV that its own cache has and, if it
leases its blocks, with what it has asked the service.  A line `{"jobs": […]}` plays requests that
come and are aborted at steps of its own: see `play`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
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


def hide_kernels() -> None:
    """Let vLLM 0.32 start on a CPU after llvmlite was imported, as LMCache does.

    It looks for kernels in everything that has a `__dict__`, and llvmlite's library answers each
    name with a C function: of special names it says now that there is none.
    """
    library: Any = importlib.import_module("llvmlite.binding.ffi")._lib_wrapper
    answer = library.__getattr__

    def get(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return answer(self, name)

    library.__getattr__ = get


class Steps:
    """Counts the steps that a scheduler plans, idle ones apart, and the requests it preempts."""

    def __init__(self, scheduler: Any) -> None:
        self._plan = scheduler.schedule
        self._preempt = scheduler._preempt_request
        self._scheduler = scheduler
        self.steps = self.preempted = 0
        scheduler.schedule = self.schedule
        scheduler._preempt_request = self.preempt

    def preempt(self, *args: Any, **kwargs: Any) -> Any:
        """Take a request's blocks away; it is computed again."""
        self.preempted += 1
        return self._preempt(*args, **kwargs)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plan a step."""
        output = self._plan(*args, **kwargs)
        self.steps += bool(output.total_num_scheduled_tokens)
        return output

    def told(self) -> dict[str, int]:
        """Give the steps, the blocks of its own cache, what was asked of the service meanwhile."""
        found = {"steps": self.steps, "preempted": self.preempted}
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


def play(engine: Any, make: Any, jobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Play requests step by step; give each when it has ended, or was aborted.

    Args:
        engine: vLLM's `LLMEngine`, in this process.
        make: makes sampling parameters.
        jobs: of each its `name`, `prompt`, `count` of tokens to generate, perhaps its `salt`, the
            step that it comes `at`, and perhaps the step, or the number of its tokens, that it is
            `aborted_at` or `aborted_after`; in the order in which they come.  Steps in which
            nothing is there to do are left out.
    """
    to_come = list(reversed(jobs))
    told: dict[str, dict[str, Any]] = {}
    aborts: dict[int, list[str]] = {}
    most: dict[str, int] = {}
    step = 0
    while to_come or told:
        if not told:
            step = max(step, to_come[-1]["at"])
        while to_come and to_come[-1]["at"] <= step:
            job = to_come.pop()
            name = job["name"]
            prompt = {"prompt_token_ids": job["prompt"]}
            if job.get("salt"):
                prompt["cache_salt"] = job["salt"]
            engine.add_request(
                name,
                prompt,
                make(max_tokens=job["count"], temperature=0, ignore_eos=True, detokenize=False),
            )
            told[name] = {"name": name, "tokens": [], "cached": None, "aborted": False}
            if job.get("aborted_at") is not None:
                aborts.setdefault(max(step, job["aborted_at"]), []).append(name)
            most[name] = job.get("aborted_after") or job["count"]
        for name in aborts.pop(step, ()):
            if name in told:
                engine.abort_request([name])
                yield told.pop(name) | {"aborted": True}
        for output in engine.step():
            one = told.get(output.request_id)
            if one is None:
                continue
            one["tokens"] = list(output.outputs[0].token_ids)
            one["cached"] = output.num_cached_tokens
            if output.finished:
                yield told.pop(output.request_id)
            elif len(one["tokens"]) >= most[output.request_id]:
                aborts.setdefault(step + 1, []).append(output.request_id)
        step += 1


def main() -> None:
    """Load the model and answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM writes its log where the answers go
    encoder = json.JSONEncoder(allow_nan=False)
    if "LMCache" in sys.argv[1]:
        hide_kernels()
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
        if "jobs" in ask:
            for one in play(peer.llm_engine, vllm.SamplingParams, ask["jobs"]):
                print(encoder.encode(one), file=answers, flush=True)
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
