"""The demo's figures: computed from what was seen, written as JSON.

A result begins with what is needed to see it again: command, seed, commit, machine, versions.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Final

from prefixcache.plain_json import json_text
from prefixcache_worker.demo.below import Below
from prefixcache_worker.demo.compare import Verdict
from prefixcache_worker.demo.ideal import ideal_tokens, num_blocks
from prefixcache_worker.demo.record import Death, Fate, Request, Run, prompt_tokens
from prefixcache_worker.demo.sentence import Sentence

LONG: Final = range(900, 1201)
"""System prompts of about 1,000 tokens: the size for which a ratio of TTFT is stated."""

_PACKAGES: Final = ("prefixcache", "torch", "transformers", "grpcio", "numpy")


def header(model: str) -> dict[str, Any]:
    """Say how and where this result was made.  Reads the machine, changes nothing."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": None,  # greedy decoding of fixed chats: nothing is drawn
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "model": model,
        "dtype": "float32",
        "machine": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }


def figures(
    shared: Run,
    unshared: Run,
    verdict: Verdict,
    sentence: Sentence | None = None,
    below: Below | None = None,
) -> dict[str, Any]:
    """Compute everything that the demo states.  O(requests² n log n), some 10 ms.

    `tokens_computed` counts the prompt tokens that were computed and kept; what a killed worker had
    in hand and nobody could use is `tokens_lost`, beside it.
    """
    requests = shared.requests
    sequenced = [request.sequenced for request in requests]
    by_worker = {
        worker: [request.sequenced for request in requests if request.worker == worker]
        for worker in shared.workers
    }
    attempts = shared.death.attempts if shared.death else ()
    computed = sum(r.num_computed for r in requests) + sum(a.num_kept for a in attempts)
    ideal = ideal_tokens(sequenced)
    separate = sum(num_blocks(served, shared.block_size) for served in by_worker.values())
    cold = [request.ttft_ms for request in shared.fated(Fate.COLD)]
    warm = [request.ttft_ms for request in shared.fated(Fate.WARM)]
    return {
        "identical": verdict.identical,
        "compared": "bits" if verdict.of_bits else "tokens",
        "numerical_ties": verdict.numerical_ties,
        "differences": [asdict(difference) for difference in verdict.differences],
        "answer_tokens_compared": verdict.num_tokens,
        "requests": len(requests),
        "workers": len(shared.workers),
        "tokens_sent": prompt_tokens(requests),
        "tokens_computed": computed,
        "tokens_ideal": ideal,
        "tokens_over_ideal_percent": round(100 * (computed - ideal) / ideal, 3) if ideal else 0.0,
        "tokens_lost": sum(attempt.num_lost for attempt in attempts),
        "tokens_separate_caches": sum(ideal_tokens(served) for served in by_worker.values()),
        "ttft_cold_ms_median": _median(cold),
        "ttft_joined_ms_median": _median([r.ttft_ms for r in shared.fated(Fate.JOINED)]),
        "ttft_warm_ms_median": _median(warm),
        "ttft_ratio": _ratio(_median(cold), _median(warm)),
        "ttft_unshared_ms_median": _median([r.ttft_ms for r in unshared.requests]),
        "ttft_at_1000_tokens": ttft_long(requests),
        "killed_worker": _killed(shared.death),
        "sentence": None if sentence is None else told_of(sentence),
        "below": None if below is None else asdict(below) | {"kept": below.kept},
        "pool_bytes_used": shared.blocks_used * shared.block_bytes,
        "separate_caches_bytes": separate * shared.block_bytes,
        "pool_blocks_used": shared.blocks_used,
        "pool_blocks_expected": num_blocks(sequenced, shared.block_size),
        "pool_blocks_leaked": shared.blocks_leaked,
        **decode_kv(requests),
        "decode_kv_side_by_side": decode_kv([r for r in requests if r.beside]),
        "seconds_shared": round(shared.seconds, 2),
        "seconds_unshared": round(unshared.seconds, 2),
        "per_request": [_line(request) for request in requests],
    }


def ttft_long(requests: Sequence[Request]) -> dict[str, Any]:
    """Give cold and warm TTFT at system prompts of about 1,000 tokens, each request undisturbed."""
    alone = [r for r in requests if r.alone and r.num_system in LONG]
    cold = [r.ttft_ms for r in alone if r.fate is Fate.COLD]
    warm = [r.ttft_ms for r in alone if r.fate is Fate.WARM]
    return {
        "system_tokens": sorted({request.num_system for request in alone}),
        "cold_ms": _median(cold),
        "warm_ms": _median(warm),
        "num_cold": len(cold),
        "num_warm": len(warm),
        "ratio": _ratio(_median(cold), _median(warm)),
    }


def decode_kv(requests: Sequence[Request]) -> dict[str, Any]:
    """Sum what decoding read: with each shared prefix once a step, and sequence by sequence."""
    read = sum(request.kv_read_bytes for request in requests)
    alone = sum(request.kv_alone_bytes for request in requests)
    return {
        "decode_kv_bytes_read": read,
        "decode_kv_bytes_per_sequence": alone,
        "decode_kv_ratio": _ratio(alone, read),
    }


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the report; makes the folder, replaces an old file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json_text(report, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def told_of(sentence: Sentence) -> dict[str, Any]:
    """Give what became of the answer whose worker was killed in mid-sentence."""
    return asdict(sentence) | {"survived": sentence.survived}


def _killed(death: Death | None) -> dict[str, Any] | None:
    if death is None:
        return None
    known = asdict(death)
    known["attempts"] = [asdict(attempt) for attempt in death.attempts]
    return known


def _line(request: Request) -> dict[str, Any]:
    ledger = request.ledger
    return {
        "id": request.id,
        "assistant": request.assistant,
        "worker": request.worker,
        "fate": str(request.fate),
        "prompt_tokens": len(request.prompt),
        **{k: getattr(ledger, k) for k in ("hit", "partial", "joined", "cold", "evicted")},
        "granularity": ledger.granularity,
        "computed": request.num_computed,
        "decode_kv_bytes_read": request.kv_read_bytes,
        "decode_kv_bytes_per_sequence": request.kv_alone_bytes,
        "answer_tokens": len(request.answer),
        "sent_s": round(request.sent_s, 4),
        "ttft_ms": round(request.ttft_ms, 2),
        "done_s": round(request.done_s or 0.0, 4),
        "alone": request.alone,
        "answer": request.text,
    }


def _median(values: Sequence[float]) -> float | None:
    return round(median(values), 2) if values else None


def _ratio(cold: float | None, warm: float | None) -> float | None:
    return round(cold / warm, 2) if cold and warm else None


def _versions() -> dict[str, str]:
    known = {}
    for package in _PACKAGES:
        try:
            known[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a checkout that was not installed
            known[package] = "not installed"
    return known


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _commit() -> str | None:
    """The checkout's commit, with a + if files were changed; None outside a checkout."""
    git = shutil.which("git")
    here = str(Path(__file__).parent)
    if git is None:
        return None
    try:
        run = [git, "-C", here]
        commit = subprocess.check_output(
            [*run, "rev-parse", "--short=12", "HEAD"], text=True, stderr=subprocess.DEVNULL
        ).strip()
        changed = subprocess.check_output(
            [*run, "status", "--porcelain", "--untracked-files=no"], stderr=subprocess.DEVNULL
        )
    except subprocess.CalledProcessError:
        return None
    return commit + "+" * bool(changed)
