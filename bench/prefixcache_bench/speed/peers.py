"""The worker beside vLLM and llama.cpp: the same prompts, the same threads, taking turns.

```
ours        bfloat16, on a service of its own     every round, for every length and batch:
ours, int8  likewise, with weights in eight bits  one after the other, by turns each the first,
vLLM        bfloat16, its build for CPUs          and none before the machine is idle
llama.cpp   Q8_0, the wheel `xllamacpp`
```
Like is compared with like: ours with vLLM, ours in eight bits with llama.cpp.

    python -m prefixcache_bench.speed.peers [--vllm PYTHON] [--quick] [--json FILE] [--publish]


First tokens are timed where they are made: in the engine, in vLLM's and in llama.cpp's own clock.
Who is not installed is left out, which is said.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from prefixcache.plain_json import json_text
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.reports.provenance import provenance
from prefixcache_bench.speed.llama_peer import Llama, LlamaFailed, llama
from prefixcache_bench.speed.serving import (
    BATCHES,
    DECODE_CONTEXT,
    TTFT_LENGTHS,
    WARM_TAIL,
    Series,
    columns,
    engine,
    engine_steps,
    first_token,
    progress,
    tokens,
)
from prefixcache_bench.speed.signals import ending_in_order
from prefixcache_bench.speed.vllm_peer import (
    ABSENT,
    PYTHON_VARIABLE,
    Vllm,
    VllmFailed,
    cold,
    decode_tokens_per_s,
    vllm,
    warm,
)
from prefixcache_worker import smollm2
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model

DOCUMENT: Final = Path("docs/worker.md")

BESIDE: Final = {"vLLM": "ours", "llama.cpp": "ours, int8"}
"""Which of us each of them is compared with."""

GOALS: Final = {"decode": 1.0, "cold": 1.0, "warm": 0.4}
"""Beside vLLM: tokens per second at least, times to the first token at most.  Beside llama.cpp:
tokens per second of one answer."""


SETTLE_S: Final = 3.0
IDLE_PERCENT: Final = 15.0
"""What may be busy of the machine before somebody is asked."""


class Ours:
    """The engine in this process."""

    def __init__(self, name: str, made: Engine) -> None:
        self.name, self._made, self._asked = name, made, 0

    def first_ms(self, prompt: list[int], seen: int) -> float:
        """Time to the first token of a prompt of which `seen` tokens are cached."""
        self._asked += 1
        seconds, computed = first_token(self._made, f"f{self._asked}", prompt)
        assert (computed == len(prompt)) == (not seen)
        return 1e3 * seconds

    def rate(self, prompts: list[list[int]], steps: int) -> float:
        """Tokens per second of all prompts, decoded side by side."""
        self._asked += 1
        taken = engine_steps(self._made, prompts, steps, f"d{self._asked}")
        return len(prompts) * len(taken) / sum(taken)


class TheirVllm:
    """vLLM."""

    name = "vLLM"

    def __init__(self, peer: Vllm) -> None:
        self._peer = peer

    def first_ms(self, prompt: list[int], seen: int) -> float:
        """As of `Ours`."""
        [told] = self._peer.generate([prompt], 1)
        return 1e3 * (warm(told, seen) if seen else cold(told)).first_token_s

    def rate(self, prompts: list[list[int]], steps: int) -> float:
        """As of `Ours`; the prompts are cached first, so that all begin together."""
        self._peer.generate(prompts, 1)
        return decode_tokens_per_s(self._peer.generate(prompts, steps + 1))


class TheirLlama:
    """llama.cpp."""

    name = "llama.cpp"

    def __init__(self, peer: Llama) -> None:
        self._peer = peer

    def first_ms(self, prompt: list[int], seen: int) -> float:
        """As of `Ours`."""
        [told] = self._peer.generate([prompt], 1)
        if bool(told["cache_n"]) != bool(seen):
            raise LlamaFailed(f"{told['cache_n']} tokens were cached, {seen} were seen")
        return float(told["prompt_ms"])

    def rate(self, prompts: list[list[int]], steps: int) -> float:
        """As of `TheirVllm`."""
        self._peer.generate(prompts, 1)
        told = self._peer.generate(prompts, steps + 1)
        return sum(float(one["predicted_per_second"]) for one in told)


Subject = Ours | TheirVllm | TheirLlama


def settle() -> None:
    """Wait until the machine is idle, some seconds at most.

    llama.cpp puts a prompt aside after it has answered, and who comes next would pay for that.
    """
    due = time.monotonic() + SETTLE_S
    while psutil.cpu_percent(0.05) > IDLE_PERCENT and time.monotonic() < due:
        pass


def measure(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Measure all that are there with so many threads."""
    draw = random.Random(options.seed)
    rounds, steps = (1, 8) if options.quick else (5, 32)
    lengths, batches = (TTFT_LENGTHS[:1], BATCHES[:2]) if options.quick else (TTFT_LENGTHS, BATCHES)
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        subjects: list[Subject] = []
        for name, weights in (("ours", "packed"), ("ours, int8", "int8")):
            model = Model.load(smollm2.NAME, dtype="bfloat16", threads=threads, weights=weights)
            subjects.append(Ours(name, stack.enter_context(engine(model))))
        if options.vllm:
            started = vllm(
                options.vllm, str(smollm2.folder()), "bfloat16", max(BATCHES), threads=threads
            )
            subjects.append(TheirVllm(stack.enter_context(started)))
        else:
            left_out["vLLM"] = ABSENT
        try:
            subjects.append(TheirLlama(stack.enter_context(llama(threads))))
        except LlamaFailed as error:
            left_out["llama.cpp"] = str(error)
        figures: dict[tuple[str, int], dict[str, Series]] = {}

        def note(kind: str, size: int, take: Callable[[Subject], float]) -> None:
            series = figures.setdefault((kind, size), {one.name: Series() for one in subjects})
            for subject in (*subjects[number % len(subjects) :], *subjects)[: len(subjects)]:
                settle()
                series[subject.name].values.append(take(subject))

        for subject in subjects:
            subject.rate([tokens(draw, 64)], 2)  # what comes once is over
        for number in range(rounds):
            for length in lengths:
                prompt = tokens(draw, length)
                other = prompt[:-WARM_TAIL] + tokens(draw, WARM_TAIL)
                note("cold", length, lambda one, p=prompt: one.first_ms(p, 0))  # type: ignore[misc]
                note(
                    "warm",
                    length,
                    lambda one, p=other: one.first_ms(p, len(p) - WARM_TAIL),  # type: ignore[misc]
                )
            for batch in batches:
                prompts = [tokens(draw, DECODE_CONTEXT) for _ in range(batch)]
                note("decode", batch, lambda one, p=prompts: one.rate(p, steps))  # type: ignore[misc]
            progress(f"{threads} threads: round {number + 1} of {rounds}")
    rows = [
        {
            "kind": kind,
            "size": size,
            **{name: one.fields() for name, one in series.items()},
            "to_ours": {
                name: series[BESIDE[name]].median / one.median
                for name, one in series.items()
                if name in BESIDE
            },
        }
        for (kind, size), series in figures.items()
    ]
    return {
        "threads": threads,
        "network": model.kind,
        "left_out": left_out,
        "rows": sorted(rows, key=lambda row: (str(row["kind"]), row["size"])),
    }


def report(found: dict[str, Any]) -> list[str]:
    """Give a table, and who is not in it, in lines."""
    names = [name for name in (*BESIDE.values(), *BESIDE) if name in found["rows"][0]]
    others = [name for name in BESIDE if name in names]
    said = [f"threads: {found['threads']}; our network: {found['network']}", ""]
    said += columns(
        ["", *names, *(f"{BESIDE[name]}/{name}" for name in others)],
        [
            [
                f"decode, batch {row['size']}, tokens/s"
                if row["kind"] == "decode"
                else f"first token, {row['size']:,} {row['kind']}, ms",
                *(f"{row[name]['median']:.0f}" for name in names),
                *(f"{row['to_ours'][name]:.2f}" for name in others),
            ]
            for row in found["rows"]
        ],
    )
    said.append("")
    said += [f"{name}: {why}" for name, why in found["left_out"].items()]
    for row in found["rows"]:
        kind, size = row["kind"], row["size"]
        for name, ratio in row["to_ours"].items():
            if name == "llama.cpp" and (kind, size) != ("decode", 1):
                continue
            goal = GOALS[kind]
            if not (ratio >= goal if kind == "decode" else ratio <= goal):
                said.append(f"MISSED beside {name}: {kind} {size}: {ratio:.2f}, goal {goal:g}")
    return said


def main(argv: list[str] | None = None) -> int:
    """Measure with one thread, then with two."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.peers", description=__doc__
    )
    parser.add_argument(
        "--quick", action="store_true", help="one round of the shortest prompt and two batches"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--publish", action="store_true", help=f"put the tables into {DOCUMENT}")
    parser.add_argument(
        "--vllm",
        metavar="PYTHON",
        default=os.environ.get(PYTHON_VARIABLE, ""),
        help=f"a Python that has vLLM installed (default: ${PYTHON_VARIABLE})",
    )
    options = parser.parse_args(argv)
    result: dict[str, Any] = provenance() | {
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    print(" · ".join(f"{key} {value}" for key, value in result.items()) + "\n")
    found: list[dict[str, Any]] = []
    said: list[str] = []
    for threads in options.threads:
        try:
            found.append(measure(options, threads))
        except (VllmFailed, LlamaFailed) as error:
            print(f"FAILED with {threads} threads: {error}")
            return 1
        lines = [*report(found[-1]), ""]
        print("\n".join(lines))
        said += lines
    if options.publish:
        publish(DOCUMENT, "peers", "\n".join(said))
    if options.json:
        options.json.write_text(json_text(result | {"found": found}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    with ending_in_order():
        sys.exit(main())
