"""vLLM on a shared pool beside vLLM alone: first tokens, decoding, chats that move, memory.

    python -m prefixcache_bench.speed.vllm [--python PYTHON] [--quick] [--seed 0]
                                                   [--rounds 7] [--eager] [--json FILE]
                                                   [--publish]

Needs an environment with vLLM: `make vllm-environment` makes one in .venv-vllm.  Each engine is a
process of one thread with the demo's model; the service is a process of its own.  Engines wait
while another is asked, and what is compared takes turns in the same minute:

```
first token   vLLM alone, cold, and what it has computed itself
              in place: cold, what it has computed itself, what another process has computed
              connector: cold, what another process has computed
decoding      batches of 1, 8 and 16: in place, and vLLM alone, which takes the same prompts
chats         each turn on another of three engines: in place, each with a cache of its own, and
              vLLM's own offloading to files that all share, where it runs
memory        of the three engines after the chats: their own, and the pool once
messages      what the engines in place asked the service, and whether a step waited for it
```
What was cold and what cached vLLM says itself (`num_cached_tokens`); it is checked.  Times are
vLLM's: from a request's entry, before it asks for a lease, to its first token.  Figures are min /
median / max.  Exit code 1 if an engine in place fails, or without an environment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import prefixcache
from prefixcache.plain_json import json_text
from prefixcache_bench.reports.provenance import commit, processor
from prefixcache_bench.speed.served import served
from prefixcache_bench.speed.vllm_peer import (
    BLOCK_SIZE,
    PYTHON_VARIABLE,
    Generated,
    Vllm,
    VllmFailed,
    cold,
    decode_tokens_per_s,
    environment,
    vllm,
    warm,
)

DOCUMENT: Final = Path("docs/benchmarks.md")
HEADING: Final = "## vLLM on a shared pool"
DTYPE: Final = "bfloat16"
POOL: Final = "1GiB"
LENGTHS: Final = (256, 1000, 2000)
BATCHES: Final = (1, 8, 16)
ENGINES: Final = 3
OWN_GOAL, CONNECTOR_GOAL, DECODE_GOAL, CHATS_GOAL = 1.15, 0.15, 0.97, 0.25
ABSENT: Final = (
    f"neither --python nor ${PYTHON_VARIABLE} names a Python that has vLLM: `make vllm-environment`"
    " makes one, .venv-vllm/bin/python (3.5 GB, minutes)"
)
LMCACHE: Final = (
    "lmcache 0.5.6 (MP mode): not measured: it does not install beside vLLM 0.32 for CPUs. It "
    "requires cupy-cuda13x, cuda-python 13, numpy<=2.2.6 and protobuf<7 (there are 2.3.5 and "
    "7.36.2), and lmcache.cuda_ops needs libc10_cuda.so, which PyTorch for CPUs does not have"
)


def offloading(folder: str) -> dict[str, Any]:
    """Give the settings by which vLLM itself offloads KV to files that engines share."""
    return {
        "kv_transfer_config": {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "spec_name": "TieringOffloadingSpec",
                "cpu_bytes_to_use": 1 << 29,
                "secondary_tiers": [{"type": "fs", "root_dir": folder}],
            },
        }
    }


def debug_files(folder: str) -> dict[str, Any]:
    """Give those of vLLM's connector that shows how one is made, with the same purpose."""
    return {
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": folder},
        }
    }


FILES: Final = {"OffloadingConnector": offloading, "ExampleConnector": debug_files}
"""vLLM's own ways to share KV through files, the better one first."""


@dataclass(slots=True)
class Series:
    """Figures of one kind, in milliseconds or tokens per second."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    def shown(self, digits: int = 0) -> str:
        """Give min / median / max.

        >>> Series([3.0, 1.0, 2.0]).shown()
        '1 / 2 / 3'
        """
        low, high = min(self.values), max(self.values)
        return " / ".join(f"{value:,.{digits}f}" for value in (low, self.median, high))


def percentile(values: Sequence[float], percent: float) -> float:
    """Give the smallest value that so many percent of them do not exceed.

    >>> percentile([1, 2, 3, 4], 50), percentile([1, 2, 3, 4], 99), percentile([5], 1)
    (2, 4, 5)
    """
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def judged(what: str, ratio: float, goal: float, *, at_least: bool = False) -> str:
    """Say whether a goal is met.

    >>> judged("other's of own", 1.1, 1.15)
    "goal met: other's of own 1.10 (at most 1.15)"
    >>> judged("in place of alone", 0.9, 0.97, at_least=True)
    'goal MISSED: in place of alone 0.90 (at least 0.97)'
    """
    met = ratio >= goal if at_least else ratio <= goal
    bound = "at least" if at_least else "at most"
    return f"goal {'met' if met else 'MISSED'}: {what} {ratio:.2f} ({bound} {goal})"


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of a chat, and who answers it."""

    chat: int
    number: int
    engine: int
    prompt: list[int]


def turns(draw: random.Random, chats: int, length: int, engines: int = ENGINES) -> list[Turn]:
    """Write chats that begin with a document of their own and go on with short questions.

    All share instructions of 200 tokens.  The turns of all chats are interleaved; each goes to
    another engine than the chat's last one.  Answers are written here as well, so that all systems
    read the same: what an engine generates is not read.

    Args:
        draw: seeded.
        chats: how many.
        length: turns of each.
        engines: how many there are.
    """
    instructions = tokens(draw, 200)
    histories = [instructions + tokens(draw, draw.randint(700, 1100)) for _ in range(chats)]
    at = [draw.randrange(engines) for _ in range(chats)]
    made = []
    for number in range(length):
        for chat in draw.sample(range(chats), chats):
            histories[chat] = histories[chat] + tokens(draw, draw.randint(20, 50))
            made.append(Turn(chat, number, at[chat], histories[chat]))
            at[chat] = (at[chat] + draw.randint(1, engines - 1)) % engines
    return made


def tokens(draw: random.Random, count: int) -> list[int]:
    """Draw tokens, none of them special."""
    return [draw.randrange(1000, 40_000) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of processes: what is each one's own, and the pool that they share, once."""

    own: int
    pool: int

    @classmethod
    def of(cls, statuses: Sequence[str], pool: int = 0) -> Memory:
        r"""Add up what `/proc/PID/status` says.

        >>> Memory.of(["Name:\tvllm\nRssAnon:\t   10 kB\n"] * 3, pool=1024)
        Memory(own=30720, pool=1024)
        """
        rows = [line.split() for text in statuses for line in text.splitlines()]
        return cls(sum(int(row[1]) << 10 for row in rows if row[0] == "RssAnon:"), pool)


def memory_of(engines: Sequence[Vllm], pool: int = 0) -> Memory:
    """Measure running engines."""
    return Memory.of(
        [Path(f"/proc/{one.pid}/status").read_text(encoding="utf-8") for one in engines], pool
    )


@dataclass(frozen=True, slots=True)
class Setting:
    """What every engine of a run is started with."""

    python: str
    model: str
    target: str
    eager: bool

    def start(self, stack: contextlib.ExitStack, **settings: Any) -> Vllm:
        """Start an engine that ends with the stack.

        Raises:
            VllmFailed: it does not start.
        """
        leases = "scheduler_cls" in settings or "PrefixcacheConnector" in json_text(settings)
        return stack.enter_context(
            vllm(
                self.python,
                self.model,
                DTYPE,
                max(BATCHES),
                keep_path=leases,
                enforce_eager=self.eager,
                async_scheduling=False,
                **settings,
            )
        )

    def alone(self, stack: contextlib.ExitStack) -> Vllm:
        """Start vLLM with a prefix cache of its own."""
        return self.start(stack)

    def in_place(self, stack: contextlib.ExitStack) -> Vllm:
        """Start vLLM in the pool."""
        return self.start(
            stack,
            scheduler_cls="prefixcache_vllm.scheduler.LeaseScheduler",
            worker_cls="prefixcache_vllm.worker.CPUWorker",
            enable_prefix_caching=False,
            kv_cache_memory_bytes=None,
            additional_config={"prefixcache": {"connect": self.target}},
        )

    def connector(self, stack: contextlib.ExitStack) -> Vllm:
        """Start vLLM that copies to and from the pool."""
        return self.start(
            stack,
            kv_transfer_config={
                "kv_connector": "PrefixcacheConnector",
                "kv_connector_module_path": "prefixcache_vllm.connector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"connect": self.target},
            },
        )


def layout_of(python: str, model: str) -> str:
    """Ask vLLM how it keeps the model's KV.

    Raises:
        VllmFailed: it does not say.
    """
    command = [
        *(python, "-m", "prefixcache_vllm.description", "in-place", model),
        *("--dtype", DTYPE, "--block-size", str(BLOCK_SIZE)),
    ]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=environment(python, keep_path=True),
        )
    except OSError as error:
        raise VllmFailed(f"{python} does not start: {error.strerror}") from error
    told = json.loads(done.stdout) if done.returncode == 0 else {}
    if "layout" not in told:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise VllmFailed(f"vLLM does not tell its layout: {told.get('refused', last)}")
    return str(told["layout"])


def one(engine: Vllm, prompt: list[int], count: int = 1) -> Generated:
    """Ask one engine one prompt."""
    return engine.generate([prompt], count)[0]


def ms(found: Generated) -> float:
    """Give the milliseconds to its first token."""
    return 1e3 * found.first_token_s


KINDS: Final = (
    ("alone, cold", "alone, cold"),
    ("alone, its own", "alone, cold"),
    ("in place, cold", "alone, cold"),
    ("in place, its own", "in place, cold"),
    ("in place, another's", "in place, cold"),
    ("connector, cold", "alone, cold"),
    ("connector, another's", "connector, cold"),
)
"""What is timed, and of what it is a part."""


Ask = tuple[str, Vllm, list[int]]
"""A kind, who is asked, and what."""


def round_of(
    alone: Vllm,
    placed: Sequence[Vllm],
    copying: Sequence[Vllm],
    prompts: list[list[int]],
    turn: int,
) -> list[list[Ask]]:
    """Give what is asked in one round: new prompts, and engines that change places."""
    first, second = placed if turn % 2 else reversed(placed)
    later: list[Ask] = [
        ("in place, its own", first, prompts[1]),
        ("in place, another's", second, prompts[1]),
    ]
    asks: list[list[Ask]] = [
        [("alone, cold", alone, prompts[0]), ("alone, its own", alone, prompts[0])],
        [("in place, cold", first, prompts[1]), *(later if turn % 4 < 2 else later[::-1])],
    ]
    if copying:
        first, second = copying if turn % 2 else reversed(copying)
        asks.append(
            [("connector, cold", first, prompts[2]), ("connector, another's", second, prompts[2])]
        )
    return asks


def first_tokens(
    alone: Vllm, placed: Sequence[Vllm], copying: Sequence[Vllm], rounds: int, draw: random.Random
) -> dict[int, dict[str, Series]]:
    """Time first tokens.

    Raises:
        VllmFailed: a cold prompt was cached, or a cached one was not.
    """
    found: dict[int, dict[str, Series]] = {n: {k: Series() for k, _ in KINDS} for n in LENGTHS}
    for turn in range(-1, rounds):  # the first one warms up
        for length in LENGTHS:
            prompts = [tokens(draw, length) for _ in range(3)]
            asks = round_of(alone, placed, copying, prompts, turn)
            draw.shuffle(asks)
            for kind, engine, prompt in [
                ask for one_after_another in asks for ask in one_after_another
            ]:
                told = one(engine, prompt)
                if kind.endswith("cold"):
                    cold(told)
                else:
                    warm(told, length)
                if turn >= 0:
                    found[length][kind].values.append(ms(told))
    return found


def decoding(
    alone: Vllm, placed: Vllm, rounds: int, steps: int, draw: random.Random
) -> dict[int, dict[str, Series]]:
    """Time decoding; both read the prompt from their cache, but in the first round."""
    found: dict[int, dict[str, Series]] = {}
    sides = {"alone": alone, "in place": placed}
    for batch in BATCHES:
        found[batch] = {name: Series() for name in sides}
        prompts = [tokens(draw, 128) for _ in range(batch)]
        for turn in range(-1, rounds):
            for name in sorted(sides, reverse=bool(turn % 2)):
                told = sides[name].generate(prompts, steps)
                if turn >= 0:
                    found[batch][name].values.append(decode_tokens_per_s(told))
    return found


def ratio_of(side: Series, other: Series) -> float:
    """Give the middle one of the ratios of each round.

    >>> ratio_of(Series([1.0, 4.0, 9.0]), Series([1.0, 2.0, 3.0]))
    2.0
    """
    pairs = zip(side.values, other.values, strict=True)
    return statistics.median(mine / its for mine, its in pairs)


@dataclass(slots=True)
class Chats:
    """What a system made of the chats."""

    first_ms: list[float] = field(default_factory=list)
    """Of each turn."""
    later_ms: list[float] = field(default_factory=list)
    """Of each turn but a chat's first one."""
    computed: int = 0
    prompt: int = 0

    def take(self, told: Generated, number: int) -> None:
        """Add a turn."""
        self.first_ms.append(ms(told))
        if number:
            self.later_ms.append(ms(told))
        self.computed += told.prompt - told.cached
        self.prompt += told.prompt


def play(systems: Mapping[str, Sequence[Vllm]], script: Sequence[Turn]) -> dict[str, Chats]:
    """Let all systems answer each turn, one after the other, in an order that changes."""
    found = {name: Chats() for name in systems}
    names = list(systems)
    for number, turn in enumerate(script):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].take(one(systems[name][turn.engine], turn.prompt, 2), turn.number)
    return found


def start_files(
    setting: Setting, stack: contextlib.ExitStack, folder: Path
) -> tuple[str, list[Vllm], list[str]]:
    """Start engines that share files by vLLM's own means; give whose, and what did not run."""
    refused = []
    for name, made in FILES.items():
        place = folder / name
        place.mkdir()
        with contextlib.ExitStack() as tried:
            try:
                engines = [
                    setting.start(tried, **made(str(place))),
                ]
                prompt = tokens(random.Random(1), 300)
                one(engines[0], prompt)
                engines += [setting.start(tried, **made(str(place))) for _ in range(ENGINES - 1)]
                warm(one(engines[1], prompt), BLOCK_SIZE * 8)
            except VllmFailed as error:
                refused.append(f"{name}: does not run here: {error}")
                continue
            stack.push(tried.pop_all())
            return name, engines, refused
    return "", [], refused


def measure(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Run everything, and say each part when it is done."""
    draw = random.Random(options.seed)
    from prefixcache_worker import smollm2

    model = str(smollm2.folder())
    layout = layout_of(options.python, model)
    rounds, steps = (2, 16) if options.quick else (options.rounds, 64)
    memory = ("--memory", POOL, "--block-size", str(BLOCK_SIZE), "--first-block", "1")
    result: dict[str, Any] = {}
    with (
        served(*memory, layout=layout) as (target, _),
        tempfile.TemporaryDirectory(prefix="prefixcache-vllm-") as folder,
        contextlib.ExitStack() as stack,
    ):
        setting = Setting(options.python, model, target, options.eager or options.quick)
        alone = [setting.alone(stack)]
        placed = [setting.in_place(stack) for _ in range(2)]
        say.about(options, alone[0].about, setting.eager)
        with contextlib.ExitStack() as short:
            copying = []
            try:
                copying = [setting.connector(short) for _ in range(2)]
            except VllmFailed as error:
                say(f"connector: not measured: {error}")
            before = placed[0].counts()
            result["first_token_ms"] = first = first_tokens(alone[0], placed, copying, rounds, draw)
            say.first_tokens(first)
            say.messages("one request at a time", before, placed[0].counts())
        before = placed[0].counts()
        result["tokens_per_s"] = decoded = decoding(alone[0], placed[0], rounds, steps, draw)
        say.decoding(decoded)
        say.messages("batches that decode", before, placed[0].counts())
        if not options.quick:
            placed.append(setting.in_place(stack))
            alone += [setting.alone(stack) for _ in range(ENGINES - 1)]
            systems = {"in place": placed, "private caches": alone}
            name, files, refused = start_files(setting, stack, Path(folder))
            if files:
                systems[name] = files
            script = turns(draw, 6, 6)
            result["chats"] = played = play(systems, script)
            say.chats(played, refused)
            with prefixcache.connect(target) as client:
                now = client.snapshot()
                used = (now.num_blocks - now.free) * pool_block_bytes(layout)
            say.memory({"in place": memory_of(placed, used), "private caches": memory_of(alone)})
        waited = [engine.counts()["waited_for_room"] for engine in placed]
        say(f"steps that waited for an answer of the service: {sum(waited)}")
        say(LMCACHE)
        with prefixcache.connect(target) as client:
            failure = client.check().failure
            say(f"invariants of the pool at the end: {failure or 'hold'}")
    return result


def pool_block_bytes(layout: str) -> int:
    """Give the bytes of one block.

    >>> pool_block_bytes("pages:30x24576:vllm")
    737280
    """
    planes, page = layout.split(":")[1].split("x")
    return int(planes) * int(page)


class Say:
    """Prints, and keeps what was printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str = "") -> None:
        """Print a line."""
        print(line, flush=True)
        self.lines.append(line)

    def about(self, options: argparse.Namespace, about: dict[str, Any], eager: bool) -> None:
        """Say what runs."""
        self(
            f"{datetime.now(UTC):%Y-%m-%d} · commit {commit()} · {processor()} · "
            f"vLLM {about['version']} · torch {about['torch']} · {DTYPE} · "
            f"{'eager' if eager else 'compiled'} · seed {options.seed}"
        )

    def first_tokens(self, found: dict[int, dict[str, Series]]) -> None:
        """Say the times to the first token."""
        self(
            f"\n{'first token, ms':24}" + "".join(f"{n:>18,} tokens{'of cold':>9}" for n in LENGTHS)
        )
        for kind, base in KINDS:
            if not found[LENGTHS[0]][kind].values:
                continue
            cells = [
                f"{found[n][kind].shown():>25}{ratio_of(found[n][kind], found[n][base]):9.3f}"
                for n in LENGTHS
            ]
            self(f"{kind:24}" + "".join(cells))
        for n in LENGTHS:
            row = found[n]
            ratio = ratio_of(row["in place, another's"], row["in place, its own"])
            self(judged(f"{n:,} tokens in place, another's of its own", ratio, OWN_GOAL))
            against = ratio_of(row["in place, another's"], row["alone, its own"])
            self(judged(f"{n:,} tokens in place, another's of vLLM's own", against, OWN_GOAL))
            if row["connector, cold"].values:
                ratio = ratio_of(row["connector, another's"], row["connector, cold"])
                self(judged(f"{n:,} tokens by connector, another's of cold", ratio, CONNECTOR_GOAL))

    def decoding(self, found: dict[int, dict[str, Series]]) -> None:
        """Say the rates of decoding."""
        self(f"\n{'decoding, tokens/s':24}{'alone':>24}{'in place':>24}{'ratio':>8}")
        for batch, row in found.items():
            ratio = ratio_of(row["in place"], row["alone"])
            self(
                f"{f'batch {batch}':24}{row['alone'].shown(1):>24}"
                f"{row['in place'].shown(1):>24}{ratio:8.3f}"
            )
        for batch, row in found.items():
            ratio = ratio_of(row["in place"], row["alone"])
            self(judged(f"batch {batch}, in place of alone", ratio, DECODE_GOAL, at_least=True))

    def chats(self, found: dict[str, Chats], refused: list[str]) -> None:
        """Say what became of the chats."""
        self(
            f"\n{'chats that move':24}{'p50 ms':>9}{'p99 ms':>9}{'p99 all':>9}"
            f"{'computed':>10}{'of':>9}"
        )
        for name, chats in found.items():
            middle, late = [percentile(chats.later_ms, percent) for percent in (50, 99)]
            self(
                f"{name:24}{middle:9,.0f}{late:9,.0f}{percentile(chats.first_ms, 99):9,.0f}"
                f"{chats.computed:10,}{chats.prompt:9,}"
            )
        self("p50 and p99 of the turns after a chat's first, which brings a new document; of all")
        for line in refused:
            self(line)
        mine = percentile(found["in place"].later_ms, 99)
        for name, chats in found.items():
            if name != "in place":
                ratio = mine / percentile(chats.later_ms, 99)
                self(judged(f"p99 in place of {name}", ratio, CHATS_GOAL))

    def memory(self, found: dict[str, Memory]) -> None:
        """Say what the engines take."""
        self(f"\n{'memory, MiB':24}{'three engines':>15}{'pool, in use':>14}{'sum':>9}")
        for name, row in found.items():
            parts = (row.own, row.pool, row.own + row.pool)
            own, pool, both = [f"{part / 2**20:,.0f}" for part in parts]
            self(f"{name:24}{own:>15}{pool:>14}{both:>9}")

    def messages(self, what: str, before: dict[str, int], after: dict[str, int]) -> None:
        """Say how many messages a step takes."""
        spent = {name: after[name] - before[name] for name in ("steps", "messages", "ops")}
        self(
            f"messages, {what}: {spent['messages']} with {spent['ops']} ops in {spent['steps']} "
            f"steps, {spent['messages'] / max(1, spent['steps']):.2f} a step"
        )


def with_section(document: str, section: str) -> str:
    r"""Put a section in the place of the one with its heading, or at the end.

    >>> with_section("# A\n\n## B\n\nold\n\n## C\n", "## B\n\nnew\n")
    '# A\n\n## B\n\nnew\n\n## C\n'
    """
    heading = section.splitlines()[0]
    before, found, rest = f"\n{document}".partition(f"\n{heading}\n")
    before = before.removeprefix("\n")
    if not found:
        return f"{document.rstrip()}\n\n{section.rstrip()}\n"
    _, more, after = rest.partition("\n## ")
    tail = f"\n\n## {after}" if more else "\n"
    return f"{before}\n{section.rstrip()}{tail}"


def publish(lines: Sequence[str], typed: Sequence[str], document: Path = DOCUMENT) -> None:
    """Write what was printed into the document of all benchmarks."""
    words = " ".join(["python -m prefixcache_bench.speed.vllm", *typed])
    section = f"{HEADING}\n\n```\n$ {words}\n" + "\n".join(lines) + "\n```\n"
    document.write_text(
        with_section(document.read_text(encoding="utf-8"), section), encoding="utf-8"
    )


def main(argv: list[str] | None = None) -> int:
    """Measure, print, publish if asked to."""
    parser = argparse.ArgumentParser(prog="prefixcache_bench.speed.vllm", allow_abbrev=False)
    parser.add_argument("--python", default=os.environ.get(PYTHON_VARIABLE), metavar="PYTHON")
    parser.add_argument("--quick", action="store_true", help="two rounds, eager, without chats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--publish", action="store_true", help=f"put the tables into {DOCUMENT}")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: at least 1 is expected")
    if not options.python:
        print(ABSENT, file=sys.stderr)
        return 1
    say = Say()
    try:
        result = measure(options, say)
    except VllmFailed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json_text(plain(result), indent=2), encoding="utf-8")
    if options.publish:
        publish(say.lines, sys.argv[1:] if argv is None else argv)
    return 0


def plain(value: Any) -> Any:
    """Give figures as JSON has them."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    return asdict(value) if isinstance(value, Series | Chats) else value


if __name__ == "__main__":
    raise SystemExit(main())
