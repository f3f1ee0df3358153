"""First tokens and decoding of vLLM on one pool, beside vLLM alone: servers, asked over HTTP.

```
alone              its own prefix cache: cold, then the same prompt again
in-1,  in-2        in place, one pool: cold on the first, then the second, then the first again
copy-1, copy-2     connectors, same pool: likewise, with prompts of their own
```
All five run at once, with one thread each, and take turns in every round: only ratios within a run
mean anything, and each is against vLLM alone's cold prefill of the same length.  Decoding is timed
from the moment when the last of a batch has its first token.

    python -m prefixcache_bench.speed.vllm --python .venv-vllm/bin/python [--rounds 7]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Final

from prefixcache.plain_json import json_text
from prefixcache_vllm.demo import stream
from prefixcache_vllm.demo.environments import why_not
from prefixcache_vllm.demo.servers import (
    Model,
    Server,
    Service,
    members,
    target_in,
    told_commands,
)
from prefixcache_worker import smollm2
from prefixcache_worker.demo.processes import stopping

LENGTHS: Final = (256, 1000, 2000)
BATCHES: Final = (1, 8)
DECODED: Final = 64
OWN_CACHE: Final = ("--kv-cache-memory-bytes", str(512 << 20))
COLD, OWN, OTHERS = "cold", "own, warm", "another's, warm"
KINDS: Final = {
    "alone": ("alone",),
    "in place": ("in-1", "in-2"),
    "connector": ("copy-1", "copy-2"),
}


def commands(model: Model, target: str) -> dict[str, list[str]]:
    """Give the command of each engine."""
    alone = [word for word in model.alone() if word != "--no-enable-prefix-caching"]
    copies = [*model.on_pool(target), "--mode", "connector", *OWN_CACHE]
    return {
        "alone": alone,
        **dict.fromkeys(KINDS["in place"], model.on_pool(target)),
        **dict.fromkeys(KINDS["connector"], copies),
    }


def first_token_s(server: Server, prompt: Sequence[int]) -> tuple[float, int]:
    """Ask for one token; give the seconds to it and the prompt tokens that were reused."""
    began_s, took_s, cached = time.perf_counter(), 0.0, 0
    for piece in stream.ask(server.port, stream.completion(prompt, 1), f"b-{random.random()}"):
        if piece.tokens and not took_s:
            took_s = time.perf_counter() - began_s
        cached = cached if piece.cached is None else piece.cached
    return took_s, cached


def decode_tokens_per_s(server: Server, prompts: Sequence[Sequence[int]]) -> float:
    """Answer prompts side by side; give the tokens per second once all have begun."""

    def times(prompt: Sequence[int]) -> list[float]:
        asked = stream.completion(prompt, DECODED) | {"ignore_eos": True}
        seen: list[float] = []
        for piece in stream.ask(server.port, asked, f"b-{random.random()}"):
            seen += [time.perf_counter()] * len(piece.tokens)
        return seen

    with ThreadPoolExecutor(len(prompts)) as pool:
        streams = list(pool.map(times, prompts))
    begin, end = max(seen[0] for seen in streams), min(seen[-1] for seen in streams)
    if end <= begin:
        raise SystemExit("the requests did not decode side by side")
    return sum(begin < at <= end for seen in streams for at in seen) / (end - begin)


def memory_bytes(session: int) -> int:
    """Give the memory of a server's processes, what they share with others divided among them."""
    total = 0
    for pid in members(session):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total


def measure(servers: dict[str, Server], rounds: int) -> dict[str, Any]:
    """Take all measurements of the engines that there are, in turn."""
    kinds = {kind: names for kind, names in KINDS.items() if names[0] in servers}
    noise = random.Random(0)
    firsts: dict[tuple[str, str, int], list[tuple[float, int]]] = {}
    rates: dict[tuple[str, int], list[float]] = {}

    def prompt(length: int) -> list[int]:
        return [noise.randrange(1000, 40000) for _ in range(length)]

    for turn in range(rounds):
        for length in LENGTHS:
            for kind in _turned(list(kinds), turn):
                first, *others = kinds[kind]
                text = prompt(length)
                steps = [(COLD, first), *((OTHERS, one) for one in others), (OWN, first)]
                for what, name in steps:
                    took = first_token_s(servers[name], text)
                    firsts.setdefault((kind, what, length), []).append(took)
        for batch in BATCHES:
            for kind in _turned(["alone", "in place"], turn):
                texts = [prompt(64) for _ in range(batch)]
                rate = decode_tokens_per_s(servers[KINDS[kind][0]], texts)
                rates.setdefault((kind, batch), []).append(rate)
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return {
        "rounds": rounds,
        "first_token": [
            {
                "kind": kind,
                "what": what,
                "tokens": length,
                "ms": round(1e3 * median(took for took, _ in seen), 1),
                "cached": sorted({cached for _, cached in seen}),
                "of_cold": round(
                    median(took for took, _ in seen)
                    / median(took for took, _ in firsts["alone", COLD, length]),
                    3,
                ),
            }
            for (kind, what, length), seen in firsts.items()
        ],
        "decode": [
            {
                "kind": kind,
                "batch": batch,
                "tokens_per_s": round(median(seen), 1),
                "of_alone": round(median(seen) / median(rates["alone", batch]), 3),
            }
            for (kind, batch), seen in rates.items()
        ],
        "memory_mb": {name: memory_bytes(one.pid) // 10**6 for name, one in servers.items()},
    }


def _turned(names: list[str], turn: int) -> list[str]:
    at = turn % len(names)
    return names[at:] + names[:at]


def table(found: dict[str, Any]) -> str:
    """Lay the figures out."""
    lines = [f"first token, medians of {found['rounds']}, interleaved; ratios to vLLM alone, cold"]
    lines.append(f"{'':<28}" + "".join(f"{length:>22,} tokens" for length in LENGTHS))
    rows = {(row["kind"], row["what"]): "" for row in found["first_token"]}
    for row in sorted(found["first_token"], key=lambda row: row["tokens"]):
        cell = f"{row['ms']:,.0f} ms {row['of_cold']:.2f}"
        rows[row["kind"], row["what"]] += f"{cell:>20} ({max(row['cached']):>5,})"
    lines += [f"{kind + ', ' + what:<28}{cells}" for (kind, what), cells in rows.items()]
    lines += ["(in brackets: prompt tokens that were reused)", ""]
    lines += [
        f"decode, batch {row['batch']}, {row['kind']:<10} {row['tokens_per_s']:>8,.1f} tokens/s  "
        f"{row['of_alone']:.2f} of alone"
        for row in found["decode"]
    ]
    each = ", ".join(f"{name} {size:,} MB" for name, size in found["memory_mb"].items())
    return "\n".join([*lines, "", f"memory, shared pages divided: {each}"])


async def run(model: Model, rounds: int, *, connectors: bool = True) -> dict[str, Any]:
    """Start all, measure, end all."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="prefixcache-vllm-") as name:
        folder = Path(name)
        service = Service("service", folder, await told_commands(model, folder))
        servers = {
            name: Server(name, words, folder, clock=time.monotonic, tell=lambda *_: None)
            for name, words in commands(model, target_in(folder)).items()
            if connectors or name not in KINDS["connector"]
        }
        async with stopping([*servers.values(), service]):
            await service.ready()
            async with asyncio.TaskGroup() as group:
                for one in servers.values():
                    group.create_task(one.ready(say))
            return await asyncio.to_thread(measure, servers, rounds)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", default=os.environ.get("PREFIXCACHE_VLLM_PYTHON", ""))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-connectors", action="store_true", help="three engines, not five")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    missing = why_not(asked.python or ".venv-vllm/bin/python")
    if missing:
        raise SystemExit(f"not measured: {missing}")
    model = Model(
        str(Path(asked.python or ".venv-vllm/bin/python").absolute()),
        str(smollm2.folder()),
        asked.dtype,
        chunk=2048,
        sequences=8,
        memory="512MiB",
    )
    found = asyncio.run(run(model, asked.rounds, connectors=not asked.no_connectors))
    if asked.json:
        asked.json.write_text(json_text(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
