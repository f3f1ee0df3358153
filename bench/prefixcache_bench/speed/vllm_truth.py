"""Whether two vLLM engines on a pool that is too small for them say what vLLM alone says.

    python -m prefixcache_bench.speed.vllm_truth [--python PYTHON] [--requests 1000] [--seed 0]
                                                         [--publish]

Needs an environment with vLLM: `make vllm-environment` makes one in .venv-vllm.  A tiny model with
random weights in float32, a process and a thread for each engine, a service with 127 blocks.

```
jobs ──┬──► vLLM alone            what is to be said, and nothing is aborted
       ├──► engine in place 1 ┐
       └──► engine in place 2 ┘   each job at one of them, at a step of its own
```
Most jobs begin with a system prompt that others have, some repeat or go on with an earlier job,
some have a salt, some are new; more come at a time than the pool has room for, so that requests are
preempted; some are aborted, at any step: while they wait, while their prompt is computed, or in
mid-answer.

Exit code 0 only if each answer is that of vLLM alone, token for token (of an aborted one what was
there by then), and nothing is left behind: with the engines idle no lease but those of their spare
blocks; when they have ended none at all, nothing in quarantine, no flight, nobody waiting; and
every invariant of the pool holds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import prefixcache
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.speed.served import served
from prefixcache_bench.speed.signals import ending_in_order
from prefixcache_bench.speed.vllm import ABSENT
from prefixcache_bench.speed.vllm_fleet import layout_of
from prefixcache_bench.speed.vllm_load import settled
from prefixcache_bench.speed.vllm_peer import (
    BLOCK_SIZE,
    PYTHON_VARIABLE,
    Vllm,
    VllmFailed,
    vllm,
)

DOCUMENT: Final = Path("docs/vllm.md")
COMMAND: Final = "python -m prefixcache_bench.speed.vllm_truth"
DTYPE: Final = "float32"
VOCABULARY: Final = 512
MEMORY: Final = "8MiB"
"""Of the pool: 127 blocks that are lent, of 32 tokens; eight requests at each engine need more."""
ENGINES, SEQUENCES, SPARE_BLOCKS = 2, 8, 8
SYSTEMS, SYSTEM_LIFE = 4, 80
"""System prompts in use at a time; requests after which one of them makes room for a new one."""
BURST_EVERY, BURST = 40, 16
"""So often so many come at once that begin small and grow: they outgrow the pool."""
SETTINGS: Final[dict[str, Any]] = {
    "enable_prefix_caching": False,
    "enforce_eager": True,
    "async_scheduling": False,
    "distributed_executor_backend": "uni",
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
}


@dataclass(frozen=True, slots=True)
class Job:
    """One request: what is asked, where, and when it comes and goes, in the engine's own steps."""

    name: str
    engine: int
    prompt: list[int]
    count: int
    at: int
    aborted_at: int | None = None
    aborted_after: int | None = None
    """Tokens of its answer."""
    salt: str | None = None

    def told(self, *, alone: bool) -> dict[str, Any]:
        """Write it as an engine takes it; vLLM alone gets all at once, and answers each."""
        if alone:
            return {"name": self.name, "prompt": self.prompt, "count": self.count, "at": 0}
        return asdict(self)


def jobs(draw: random.Random, number: int) -> list[Job]:
    """Write the requests, in the order in which they come.

    >>> made = jobs(random.Random(0), 300)
    >>> sorted({job.engine for job in made}), len({job.name for job in made})
    ([0, 1], 300)
    """
    at = [0] * ENGINES
    systems = [tokens(draw, draw.randint(40, 400)) for _ in range(SYSTEMS)]
    made: list[Job] = []
    for index in range(number):
        if index % (SYSTEM_LIFE // SYSTEMS) == SYSTEM_LIFE // SYSTEMS - 1:
            systems[draw.randrange(SYSTEMS)] = tokens(draw, draw.randint(40, 400))
        engine = draw.randrange(ENGINES)
        is_burst = index % BURST_EVERY < BURST
        at[engine] += 0 if is_burst else draw.choice((0, 0, 1, 3, 12, 40))
        match draw.random():
            case _ if is_burst:
                prompt = tokens(draw, draw.randint(2, 40))
            case kind if kind < 0.55:
                prompt = draw.choice(systems) + tokens(draw, draw.randint(1, 60))
            case kind if kind < 0.65 and made:
                prompt = draw.choice(made[-20:]).prompt
            case kind if kind < 0.75 and made:
                prompt = draw.choice(made[-20:]).prompt[:600] + tokens(draw, draw.randint(5, 80))
            case _:
                prompt = tokens(draw, draw.randint(2, 400))
        count = draw.randint(200, 400) if is_burst else draw.choice((2, 16, 48, 96))
        goes = draw.random()
        made.append(
            Job(
                name=f"job-{index}",
                engine=engine,
                prompt=prompt,
                count=count,
                at=at[engine],
                aborted_at=at[engine] + draw.randrange(400) if goes < 0.08 else None,
                aborted_after=draw.randrange(1, count) if 0.08 <= goes < 0.16 else None,
                salt=draw.choice(("blue", "red")) if draw.random() < 0.1 else None,
            )
        )
    return made


def tokens(draw: random.Random, count: int) -> list[int]:
    """Draw tokens, none of them special."""
    return [draw.randrange(3, VOCABULARY) for _ in range(count)]


@dataclass(slots=True)
class Found:
    """What the engines said, held against what is to be said."""

    finished: int = 0
    aborted: int = 0
    in_mid_answer: int = 0
    """Of the aborted ones, those that had begun to answer."""
    tokens: int = 0
    """That were compared."""
    wrong: list[str] = field(default_factory=list)

    def compare(self, job: Job, said: Mapping[str, Any], want: Sequence[int]) -> None:
        """Take in the answer of one job.

        >>> found, job = Found(), Job("j", 0, [5], 3, at=0)
        >>> found.compare(job, {"tokens": [1, 2], "aborted": True}, [1, 2, 3])
        >>> found.compare(job, {"tokens": [1, 2], "aborted": False}, [1, 2, 3])
        >>> found.compare(job, {"tokens": [1, 2, 4], "aborted": False}, [1, 2, 3])
        >>> found.finished, found.aborted, found.in_mid_answer, found.tokens
        (2, 1, 1, 7)
        >>> for line in found.wrong: print(line)
        j: 2 tokens, not 3
        j: token 2 is 4, vLLM alone says 3
        """
        got = list(said["tokens"])
        self.tokens += len(got)
        if said["aborted"]:
            self.aborted += 1
            self.in_mid_answer += bool(got)
        else:
            self.finished += 1
        for at, (one, other) in enumerate(zip(got, want, strict=False)):
            if one != other:
                self.wrong.append(f"{job.name}: token {at} is {one}, vLLM alone says {other}")
                return
        if len(got) != job.count and not said["aborted"]:
            self.wrong.append(f"{job.name}: {len(got)} tokens, not {job.count}")


def answers(engine: Vllm, asked: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Have an engine play jobs; give its answers by their names."""
    return {said["name"]: said for said in engine.play(list(asked))}


def run(python: str, number: int, seed: int) -> tuple[list[str], list[str]]:
    """Run everything; give what was seen, and what is wrong.

    Raises:
        VllmFailed: vLLM did not run.
    """
    from prefixcache_vllm.demo.tiny import write_weights

    made = jobs(random.Random(seed), number)
    memory = ("--memory", MEMORY, "--block-size", str(BLOCK_SIZE), "--first-block", "1")
    found = Found()
    with tempfile.TemporaryDirectory(prefix="prefixcache-truth-") as folder:
        write_weights(Path(folder), VOCABULARY)
        layout = layout_of(python, folder, DTYPE)
        with (
            served(*memory, layout=layout) as (target, _),
            prefixcache.connect(target) as client,
        ):
            # Threads end when the engines do, that they listen to.
            with ThreadPoolExecutor(ENGINES) as threads, contextlib.ExitStack() as stack:
                places: dict[str, Any] = {
                    "scheduler_cls": "prefixcache_vllm.scheduler.LeaseScheduler",
                    "worker_cls": "prefixcache_vllm.worker.CPUWorker",
                    "kv_cache_memory_bytes": None,
                    "additional_config": {
                        "prefixcache": {"connect": target, "spare_blocks": SPARE_BLOCKS}
                    },
                }

                begun = [
                    stack.enter_context(
                        vllm(
                            *(python, folder, DTYPE, SEQUENCES),
                            keep_path=True,
                            wait=False,
                            **SETTINGS | more,
                        )
                    )
                    for more in ({}, *[places] * ENGINES)
                ]
                alone, *engines = [engine.ready() for engine in begun]
                began = time.monotonic()
                playing = [
                    threads.submit(
                        answers,
                        engine,
                        [job.told(alone=False) for job in made if job.engine == index],
                    )
                    for index, engine in enumerate(engines)
                ]
                said = {name: one for play in playing for name, one in play.result().items()}
                took = time.monotonic() - began
                idle = [f"engines idle: {what}" for what in settled(client, ENGINES)]
                counts = [engine.counts() for engine in engines]
                want = answers(alone, [job.told(alone=True) for job in made])
            ended = [f"engines ended: {what}" for what in settled(client, 0)]
            last = client.snapshot()
    for job in made:
        found.compare(job, said[job.name], want[job.name]["tokens"])
    summed = {name: sum(one[name] for one in counts) for name in counts[0]}
    return [
        f"{number:,} requests at {ENGINES} engines in place, {DTYPE}, {last.num_blocks} blocks of "
        f"{last.block_size} tokens, seed {seed}, {took:.0f} s",
        f"answers     {found.finished:,} finished, {found.aborted:,} aborted "
        f"({found.in_mid_answer:,} of them in mid-answer): {found.tokens:,} tokens, "
        f"{len(found.wrong)} answers differ from vLLM alone",
        f"prompts     {summed['prompt_tokens']:,} tokens granted, {summed['reused_tokens']:,} of "
        "them computed before",
        f"pressure    {summed['preempted']:,} preempted, {summed['steps']:,} steps, "
        f"{summed['sat_out']:,} times a request sat one out for want of room, {summed['lost']:,} "
        "leases lost",
        f"afterwards  {last.num_leases} leases, {last.num_flights} flights, {last.quarantined} "
        f"quarantined, {last.waiting} waiting, {last.free + last.evictable} of {last.num_blocks} "
        "blocks free or evictable",
    ], found.wrong + idle + ended


def main(argv: list[str] | None = None) -> int:
    """Ask, compare, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(prog=COMMAND, allow_abbrev=False)
    parser.add_argument("--python", default=os.environ.get(PYTHON_VARIABLE), metavar="PYTHON")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--publish", action="store_true", help=f"put the figures into {DOCUMENT}")
    options = parser.parse_args(argv)
    if not options.python:
        print(ABSENT, file=sys.stderr)
        return 1
    try:
        with ending_in_order():
            lines, wrong = run(options.python, options.requests, options.seed)
    except VllmFailed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    text = "\n".join([*lines, *(f"WRONG: {what}" for what in wrong)])
    print(text)
    if options.publish and not wrong:
        publish(DOCUMENT, "vllm-truth", f"$ {COMMAND}\n{text}")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
