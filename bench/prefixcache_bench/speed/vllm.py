"""vLLM on a shared pool beside vLLM alone: first tokens, decoding, chats that move, memory.

    python -m prefixcache_bench.speed.vllm [--python PYTHON] [--quick] [--seed 0] [--rounds 11]
                                           [--eager] [--only PART] [--json FILE] [--publish]
                                           [--lmcache PYTHON]

Needs an environment with vLLM: `make vllm-environment` makes one in .venv-vllm.  Each engine is a
process of one thread with the demo's model; the service is a process of its own.  Engines wait
while another is asked, and what is compared takes turns in the same minute:

```
first-token   vLLM alone, cold, and what it has computed itself
              in place: cold, what it has computed itself, what another process has computed
              connector: cold, what another process has computed
decoding      batches of 1, 8 and 16: in place, and vLLM alone, which takes the same prompts
chats         each turn on another of three engines: in place, and each with a cache of its own;
              then their memory: each one's own, the pool once, and the KV that they keep
files         the same beside vLLM's own offloading to files that all share, or why it does not run
lmcache       first tokens and the same chats, in place and through a server of LMCache's
```
What was cold and what cached vLLM says itself (`num_cached_tokens`); it is checked.  Times are
vLLM's: from a request's entry, before it asks for a lease, to its first token.  Figures are min /
median / max, ratios the middle one of the ratios of each round.

Each part has a service and engines of its own, and prints, publishes and writes its figures when it
is done: one that fails says why and leaves the others alone.  Exit code 1 if one failed, or without
an environment; a goal that is missed is printed, and no failure.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from prefixcache.plain_json import json_text
from prefixcache_bench.reports.provenance import commit, processor, provenance
from prefixcache_bench.speed.signals import ending_in_order
from prefixcache_bench.speed.vllm_chats import Chats, ideal, play, tokens, turns
from prefixcache_bench.speed.vllm_figures import Say, Series, percentile, ratio_of
from prefixcache_bench.speed.vllm_fleet import (
    DTYPE,
    MAX_REQUESTS,
    Fleet,
    Kept,
    Memory,
    fleet,
    layout_of,
)
from prefixcache_bench.speed.vllm_peer import (
    PYTHON_VARIABLE,
    Vllm,
    VllmFailed,
    cold,
    decode_tokens_per_s,
    warm,
)

DOCUMENT: Final = Path("docs/benchmarks.md")
POOL_GB: Final = 1
LENGTHS: Final = (256, 1000, 2000)
BATCHES: Final = (1, 8, MAX_REQUESTS)
STEPS: Final = 64
ENGINES: Final = 3
CHATS, TURNS = 17, 7
"""Of them 102 turns are later than a chat's first: enough to have a 99th percentile."""
WARM_UPS: Final = 2
"""Rounds that do not count: engines change places, so it takes two until each was asked all."""
OWN_GOAL, CONNECTOR_GOAL, DECODE_GOAL, CHATS_GOAL = 1.15, 0.15, 0.97, 0.25
ABSENT: Final = (
    f"neither --python nor ${PYTHON_VARIABLE} names a Python that has vLLM: `make vllm-environment`"
    " makes one, .venv-vllm/bin/python (3.5 GB, minutes)"
)

LMCACHE_VARIABLE: Final = "PREFIXCACHE_LMCACHE_PYTHON"
LMCACHE_ABSENT: Final = (
    f"beside LMCache: not measured: neither --lmcache nor ${LMCACHE_VARIABLE} names a Python that "
    "has vLLM and LMCache (docs/vllm.md says how to make one)"
)

Ask = tuple[str, Vllm, list[int]]
"""A kind, who is asked, and what."""

Figures = dict[str, Any]


def round_of(
    alone: Vllm, pairs: Mapping[str, Sequence[Vllm]], draw: random.Random, length: int, turn: int
) -> list[list[Ask]]:
    """Give what is asked in one round: new prompts, and engines that change places.

    Args:
        alone: vLLM with a cache of its own.
        pairs: two engines that share, of each kind.
        draw: what draws the prompts.
        length: tokens of each.
        turn: which round.
    """
    prompt = tokens(draw, length)
    asks: list[list[Ask]] = [[("alone, cold", alone, prompt), ("alone, its own", alone, prompt)]]
    for kind, (one, two) in pairs.items():
        prompt = tokens(draw, length)
        first, second = (one, two) if turn % 2 else (two, one)
        later: list[Ask] = [
            (f"{kind}, its own", first, prompt),
            (f"{kind}, another's", second, prompt),
        ]
        later = later if turn % 4 < 2 else later[::-1]
        asks.append([(f"{kind}, cold", first, prompt), *later])
    draw.shuffle(asks)
    return asks


def first_tokens(
    alone: Vllm,
    pairs: Mapping[str, Sequence[Vllm]],
    rounds: int,
    draw: random.Random,
    say: Say,
) -> dict[int, dict[str, Series]]:
    """Time first tokens, in milliseconds, of each kind.

    Raises:
        VllmFailed: a cold prompt was cached, or a cached one was not.
    """
    found: dict[int, dict[str, Series]] = {length: {} for length in LENGTHS}
    for turn in range(-WARM_UPS, rounds):
        say.progress(f"first tokens: {round_name(turn, rounds)}")
        for length in LENGTHS:
            asks = round_of(alone, pairs, draw, length, turn)
            for kind, engine, prompt in [ask for one in asks for ask in one]:
                told = engine.generate([prompt], 1)[0]
                try:
                    told = cold(told) if kind.endswith("cold") else warm(told, length)
                except VllmFailed as error:
                    raise VllmFailed(f"{kind}: {error}") from None
                if turn >= 0:
                    series = found[length].setdefault(kind, Series())
                    series.values.append(1e3 * told.first_token_s)
    return found


def round_name(turn: int, rounds: int) -> str:
    """Name a round.

    >>> round_name(-1, 7), round_name(0, 7)
    ('warm-up', 'round 1 of 7')
    """
    return f"round {turn + 1} of {rounds}" if turn >= 0 else "warm-up"


def decoding(
    alone: Vllm, placed: Vllm, rounds: int, steps: int, draw: random.Random, say: Say
) -> dict[int, dict[str, Series]]:
    """Time decoding, in tokens per second; but in a warm-up, prompts are read from the cache.

    Raises:
        VllmFailed: a prompt was computed, so that decoding waited for it.
    """
    found: dict[int, dict[str, Series]] = {}
    sides = {"alone": alone, "in place": placed}
    for batch in BATCHES:
        found[batch] = {name: Series() for name in sides}
        prompts = [tokens(draw, 128) for _ in range(batch)]
        for turn in range(-WARM_UPS, rounds):
            say.progress(f"decoding: batch {batch}, {round_name(turn, rounds)}")
            for name in sorted(sides, reverse=bool(turn % 2)):
                told = sides[name].generate(prompts, steps)
                if turn >= 0:
                    rate = decode_tokens_per_s([warm(one, 128) for one in told])
                    found[batch][name].values.append(rate)
    return found


def first_token_part(made: Fleet, options: argparse.Namespace, say: Say) -> Figures:
    """Time first tokens: alone, in place, by connector."""
    engines = made.start(alone=1, in_place=2, connector=2)
    alone, placed, copying = engines["alone"][0], engines["in_place"], engines["connector"]
    say_about(options, alone, say)
    before = placed[0].counts()
    pairs = {"in place": placed, "connector": copying}
    found = first_tokens(alone, pairs, options.rounds, drawing(options, "first-token"), say)
    say_first_tokens(found, pairs, say)
    for n, row in found.items():
        another = row["in place, another's"]
        own = ratio_of(another, row["in place, its own"])
        say.goal(f"{n:,} tokens in place, another's of its own", own, OWN_GOAL)
        against = ratio_of(another, row["alone, its own"])
        say.goal(f"{n:,} tokens in place, another's of vLLM's own", against, OWN_GOAL)
        copied = ratio_of(row["connector, another's"], row["connector, cold"])
        say.goal(f"{n:,} tokens by connector, another's of cold", copied, CONNECTOR_GOAL)
        if copied > CONNECTOR_GOAL:
            own = ratio_of(row["alone, its own"], row["alone, cold"])
            say(f"  (vLLM reading its own cache, by whole blocks: {own:.3f} of cold)")
    say_messages("one request at a time", before, placed[0].counts(), say)
    return {"first_token_ms": found}


def decoding_part(made: Fleet, options: argparse.Namespace, say: Say) -> Figures:
    """Time decoding: in place, alone."""
    engines = made.start(alone=1, in_place=1)
    alone, placed = engines["alone"][0], engines["in_place"][0]
    say_about(options, alone, say)
    before = placed.counts()
    steps = 16 if options.quick else STEPS
    found = decoding(alone, placed, options.rounds, steps, drawing(options, "decoding"), say)
    say(f"\n{'decoding, tokens/s':24}{'alone':>24}{'in place':>24}{'ratio':>8}")
    ratios = {batch: ratio_of(row["in place"], row["alone"]) for batch, row in found.items()}
    for batch, row in found.items():
        alone_s, placed_s = row["alone"].shown(1), row["in place"].shown(1)
        say(f"{f'batch {batch}':24}{alone_s:>24}{placed_s:>24}{ratios[batch]:8.3f}")
    for batch, ratio in ratios.items():
        say.goal(f"batch {batch}, in place of alone", ratio, DECODE_GOAL, at_least=True)
    say_messages("batches that decode", before, placed.counts(), say)
    return {"tokens_per_s": found}


def chats_part(made: Fleet, options: argparse.Namespace, say: Say) -> Figures:
    """Play chats that move, in place and with private caches; then look at their memory."""
    engines = made.start(in_place=ENGINES, alone=ENGINES)
    placed, alone = engines["in_place"], engines["alone"]
    say_about(options, alone[0], say)
    played = play_and_say({"in place": placed, "private caches": alone}, options, say)
    memory: dict[str, tuple[Memory, Kept | None]] = {
        "in place": (made.memory_of(placed, made.service_pid), made.kept_in_pool()),
        "private caches": (made.memory_of(alone), made.kept_by(alone)),
    }
    say_memory(memory, say)
    return {"chats": played, "memory_bytes": memory}


def files_part(made: Fleet, options: argparse.Namespace, say: Say) -> Figures:
    """Play the same chats beside vLLM's own sharing through files, where it runs."""
    with tempfile.TemporaryDirectory(prefix="prefixcache-vllm-") as folder:
        name, files, refused = made.start_files(ENGINES, Path(folder))
        for line in refused:
            say(line)
        if not files:
            say("chats beside vLLM's own sharing through files: not measured")
            return {"refused": refused}
        placed = made.start(in_place=ENGINES)["in_place"]
        say_about(options, files[0], say)
        played = play_and_say({"in place": placed, name: files}, options, say)
        written = sum(one.stat().st_size for one in Path(folder).rglob("*") if one.is_file())
        memory: dict[str, tuple[Memory, Kept | None]] = {
            "in place": (made.memory_of(placed, made.service_pid), made.kept_in_pool()),
            name: (made.memory_of(files), made.kept_by(files)),
        }
        say_memory(memory, say)
        say(f"and {written / 2**20:,.0f} MiB in files")
    return {"chats": played, "memory_bytes": memory, "file_bytes": written, "refused": refused}


def lmcache_part(made: Fleet, options: argparse.Namespace, say: Say) -> Figures:
    """Time first tokens and play the chats beside engines that share through LMCache's server."""
    if not options.lmcache:
        say(LMCACHE_ABSENT)
        return {"refused": [LMCACHE_ABSENT]}
    engines = made.start(alone=1, in_place=ENGINES)
    alone, placed = engines["alone"][0], engines["in_place"]
    copying, server = made.start_lmcache(ENGINES, options.lmcache, POOL_GB)
    say_about(options, copying[0], say)
    pairs = {"in place": placed[:2], "LMCache": copying[:2]}
    found = first_tokens(alone, pairs, options.rounds, drawing(options, "first-token"), say)
    say_first_tokens(found, pairs, say)
    for n, row in found.items():
        ratio = ratio_of(row["in place, another's"], row["LMCache, another's"])
        say(f"{n:,} tokens, another's, in place of LMCache: {ratio:.3f}")
    played = play_and_say({"in place": placed, "LMCache": copying}, options, say, goal=None)
    memory: dict[str, tuple[Memory, Kept | None]] = {
        "in place": (made.memory_of(placed, made.service_pid), made.kept_in_pool()),
        "LMCache": (made.memory_of(copying, server), None),
    }
    say_memory(memory, say)
    return {"first_token_ms": found, "chats": played, "memory_bytes": memory}


PARTS: Final[dict[str, tuple[str, Callable[[Fleet, argparse.Namespace, Say], Figures]]]] = {
    "first-token": ("vLLM on a shared pool: first tokens", first_token_part),
    "decoding": ("vLLM on a shared pool: decoding", decoding_part),
    "chats": ("vLLM on a shared pool: chats that move, and memory", chats_part),
    "files": ("vLLM on a shared pool: beside shared files", files_part),
    "lmcache": ("vLLM on a shared pool: beside LMCache", lmcache_part),
}
"""The parts, each with the title of its section in the document of all benchmarks."""


def play_and_say(
    systems: Mapping[str, Sequence[Vllm]],
    options: argparse.Namespace,
    say: Say,
    *,
    goal: float | None = CHATS_GOAL,
) -> dict[str, Chats]:
    """Play chats on systems, "in place" one of them, and say what became of them.

    Args:
        systems: the engines of each.
        options: of the run.
        say: told the figures.
        goal: for the late first tokens in place, as a part of another's; None if nothing is
            promised beside it.
    """
    chats, length = (3, 3) if options.quick else (CHATS, TURNS)
    draw = drawing(options, "chats")
    say.progress("chats: warm-up")
    for engines in systems.values():
        for engine in engines:
            for prompt in [tokens(draw, count) for count in (1200, 40)]:
                engine.generate([prompt], 2)
                engine.generate([prompt + tokens(draw, 40)], 2)
    script = turns(draw, chats, length, ENGINES)
    found = play(systems, script, say)
    say(
        f"\n{'chats that move':24}{'p50 ms':>9}{'p99 ms':>9}{'p99 all':>9}{'computed':>10}{'of':>9}"
    )
    for name, chat in found.items():
        middle, late = [percentile(chat.later_ms, percent) for percent in (50, 99)]
        say(
            f"{name:24}{middle:9,.0f}{late:9,.0f}{percentile(chat.first_ms, 99):9,.0f}"
            f"{chat.computed:10,}{chat.prompt:9,}"
        )
    new = ideal(script)
    say(f"{chats} chats of {length} turns; {new:,} tokens are new to all and must be computed")
    say(
        f"p50 and p99 of the {chats * (length - 1)} turns after a chat's first, which brings a new "
        "document; then of all"
    )
    mine = percentile(found["in place"].later_ms, 99)
    for name, chat in found.items():
        if name != "in place":
            ratio = mine / percentile(chat.later_ms, 99)
            if goal is None:
                say(f"p99 in place of {name}: {ratio:.3f}")
            else:
                say.goal(f"p99 in place of {name}", ratio, goal)
    return found


def say_first_tokens(found: dict[int, dict[str, Series]], pairs: Iterable[str], say: Say) -> None:
    """Say the times to the first token, each as a part of the cold one of its kind."""
    rows = [("alone, cold", "alone, cold"), ("alone, its own", "alone, cold")]
    for kind in pairs:
        rows.append((f"{kind}, cold", "alone, cold"))
        rows += [(f"{kind}, {whose}", f"{kind}, cold") for whose in ("its own", "another's")]
    say(f"\n{'first token, ms':24}" + "".join(f"{n:>18,} tokens{'of cold':>9}" for n in found))
    for kind, base in rows:
        cells = [
            f"{row[kind].shown():>25}{ratio_of(row[kind], row[base]):9.3f}"
            for row in found.values()
        ]
        say(f"{kind:24}" + "".join(cells))
    say("of cold: of the cold one of its kind; cold ones: of vLLM's alone")


def say_memory(found: Mapping[str, tuple[Memory, Kept | None]], say: Say) -> None:
    """Say what the engines take."""
    say(
        f"\n{'memory, MiB':24}{'processes':>11}{'pool, once':>12}{'sum':>9}"
        f"{'KV kept':>10}{'room for KV':>13}"
    )
    for name, (memory, kept) in found.items():
        parts = (memory.own, memory.shared, memory.own + memory.shared)
        own, shared, both = [f"{part / 2**20:,.0f}" for part in parts]
        kv = room = "-"
        if kept is not None:
            kv, room = [f"{part / 2**20:,.0f}" for part in (kept.kept, kept.room)]
        say(f"{name:24}{own:>11}{shared:>12}{both:>9}{kv:>10}{room:>13}")
    say(f"of {ENGINES} engines and their server, if any; pages that were touched, each once")


def say_messages(what: str, before: dict[str, int], after: dict[str, int], say: Say) -> None:
    """Say how many messages a step takes, and whether one waited."""
    names = ("steps", "messages", "ops", "sat_out")
    spent = {name: after[name] - before[name] for name in names}
    say(
        f"messages, {what}: {spent['messages']} with {spent['ops']} ops in {spent['steps']} "
        f"steps, {spent['messages'] / max(1, spent['steps']):.2f} a step; "
        f"{spent['sat_out']} times a request sat one out for want of room"
    )


def say_about(options: argparse.Namespace, engine: Vllm, say: Say) -> None:
    """Say what runs."""
    about = engine.about
    say(
        f"{datetime.now(UTC):%Y-%m-%d} · commit {commit()} · {processor()} · "
        f"vLLM {about['version']} · torch {about['torch']} · {DTYPE} · "
        f"{'compiled' if about['compiled'] else 'eager'} · {about['threads']} thread an engine · "
        f"seed {options.seed}"
    )


def drawing(options: argparse.Namespace, part: str) -> random.Random:
    """Give what draws a part's prompts: the same ones whatever other parts run."""
    return random.Random(f"{options.seed}/{part}")


def run_part(part: str, options: argparse.Namespace, model: str, layout: str, say: Say) -> Figures:
    """Run a part with a service of its own.

    Raises:
        VllmFailed: an engine failed, a figure cannot be the one that was asked for, or something
            was left in the pool.
        CacheError: the service failed.
    """
    eager = options.eager or options.quick
    with fleet(options.python, model, layout, f"{POOL_GB}GiB", eager=eager, say=say) as made:
        found = PARTS[part][1](made, options, say)
        if left := made.left():
            raise VllmFailed(f"left in the pool: {'; '.join(left)}")
        say("nothing left in the pool, its invariants hold")
    return found


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


def publish(title: str, lines: Sequence[str], words: str, document: Path) -> None:
    """Write what a part printed into the document of all benchmarks."""
    section = f"## {title}\n\n```\n$ {words}\n" + "\n".join(lines) + "\n```\n"
    document.write_text(
        with_section(document.read_text(encoding="utf-8"), section), encoding="utf-8"
    )


def run(options: argparse.Namespace, typed: Sequence[str]) -> int:
    """Run the parts, keep what each found, and sum up; 1 if one failed."""
    from prefixcache_worker import smollm2

    model = str(smollm2.folder())
    layout = layout_of(options.python, model)
    result: dict[str, Any] = {"run": provenance(), "parts": {}}
    words = " ".join(["python -m prefixcache_bench.speed.vllm", *typed])
    failed, met, missed = [], 0, 0
    for part in options.only or PARTS:
        say = Say()
        try:
            result["parts"][part] = plain(run_part(part, options, model, layout, say))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the other parts run all the same
            if not isinstance(error, VllmFailed):
                traceback.print_exc()
            failed.append(part)
            result["parts"][part] = {"failed": str(error)}
            print(f"FAILED: {part}: {error}", flush=True)
        else:
            if options.publish:
                publish(PARTS[part][0], say.lines, words, DOCUMENT)
        met, missed = met + say.met, missed + say.missed
        if options.json:
            options.json.write_text(json_text(result, indent=2), encoding="utf-8")
        print(flush=True)
    ran = len(result["parts"])
    print(
        f"{ran - len(failed)} of {ran} parts measured; goals: {met} met, {missed} missed"
        + (f"; FAILED: {', '.join(failed)}" if failed else "")
    )
    return bool(failed)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, publish if asked to."""
    parser = argparse.ArgumentParser(prog="prefixcache_bench.speed.vllm", allow_abbrev=False)
    parser.add_argument("--python", default=os.environ.get(PYTHON_VARIABLE), metavar="PYTHON")
    parser.add_argument("--lmcache", default=os.environ.get(LMCACHE_VARIABLE), metavar="PYTHON")
    parser.add_argument(
        "--quick", action="store_true", help="two rounds, eager, short answers, few chats"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, help="11 unless --quick says 2")
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument(
        "--only",
        action="append",
        choices=list(PARTS),
        metavar="PART",
        help=f"{', '.join(PARTS)}; may be given more than once",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures there, after each part"
    )
    parser.add_argument(
        "--publish", action="store_true", help=f"put each part's tables into {DOCUMENT}"
    )
    options = parser.parse_args(argv)
    if options.rounds is None:
        options.rounds = 2 if options.quick else 11
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: at least 1 is expected")
    if not options.python:
        print(ABSENT, file=sys.stderr)
        return 1
    try:
        with ending_in_order():
            return run(options, sys.argv[1:] if argv is None else argv)
    except VllmFailed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1


def plain(value: Any) -> Any:
    """Give figures as JSON has them.

    >>> plain({256: (Series([1.0]), "words")})
    {'256': [{'values': [1.0]}, 'words']}
    """
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


if __name__ == "__main__":
    raise SystemExit(main())
