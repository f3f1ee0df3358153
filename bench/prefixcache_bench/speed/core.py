"""What one request costs the core: as plain Python, compiled, of another commit, and SGLang's core.

    python -m prefixcache_bench.speed.core [--base ../base] [--sglang PYTHON] [--rounds N] [--quick]

Each is a process of its own, filled with the same chats; they take turns, round by round.  A job is
a stored chat with a new message of 37 tokens and an answer of 256:

```
ours      acquire (match, allocate, lock, lease)    commit 293 tokens      release
SGLang    match, lock                               insert 293 tokens      unlock
```
The figure of a round is the median of its jobs, in microseconds.  The core is compiled in a folder
of its own, which takes a minute; `--pure` leaves it out.  `--base` is a checkout of another commit.
SGLang's tree in Rust, as its scheduler calls it, without an allocator and without leases, is
measured where `--sglang` or `$PREFIXCACHE_SGLANG_PYTHON` names a Python that has it, such as that
of a venv with the wheel `sglang`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import IO, Final, NamedTuple, cast

from prefixcache_bench.speed.compiling import ROOT, NotMeasured, compile_core, sources_alone
from prefixcache_bench.speed.radix_workload import DECODED_TOKENS, FRESH_TOKENS, build

PYTHON_VARIABLE: Final = "PREFIXCACHE_SGLANG_PYTHON"
ABSENT: Final = f"neither --sglang nor ${PYTHON_VARIABLE} names a Python that has SGLang"
LENGTHS: Final = (1_000, 4_000, 32_000)
BLOCK_SIZE: Final = 16
TOKEN_BYTES: Final = 4
PURE, COMPILED, BASE, SGLANG = "pure Python", "compiled", "base", "SGLang"
GOALS: Final = {
    (PURE, BASE): 0.75,
    (COMPILED, BASE): 0.5,
    (PURE, SGLANG): 1.0,
    (COMPILED, SGLANG): 0.5,
}
"""At most so many times the other, at 4,000 tokens."""

Steps = tuple[float, float, float]
"""Microseconds of the three parts of a job."""
Job = Callable[[bytes, bytes], Steps]
"""Does a job with a prompt and what is decoded after it, as packed tokens."""


# ------------------------------------------------------------------------- in the child's process


def our_core() -> tuple[str, Job]:
    """Make our core, whichever stands first on the path."""
    cache_module = import_module("prefixcache.core.cache")
    types = import_module("prefixcache.types")
    cache = cache_module.PrefixCache(400_000, BLOCK_SIZE, ttl_s=1e9)
    worker, space = types.WorkerId(1), types.Namespace("benchmark")
    cache.attach(worker, space, now=0.0)
    clock = time.perf_counter_ns
    now = 0.0

    def job(prompt: bytes, decoded: bytes) -> Steps:
        nonlocal now
        now += 1.0
        total = (len(prompt) + len(decoded)) // TOKEN_BYTES
        reserve = len(decoded) // TOKEN_BYTES
        begun = clock()
        grant = cache.acquire(worker, space, prompt, reserve=reserve, now=now)
        acquired = clock()
        cache.commit(worker, grant.lease, total, decoded, now=now)
        committed = clock()
        cache.release(worker, grant.lease, now=now)
        return _parts(begun, acquired, committed, clock())

    return str(cache_module.__file__), job


def sglang_core() -> tuple[str, Job]:
    """Make SGLang's tree in Rust."""
    modules = "sglang.srt.mem_cache"
    tree = import_module(f"{modules}.rust_tree_core.adapter").RustUnifiedTreeCore
    base = import_module(f"{modules}.base_prefix_cache")
    make_key = import_module(f"{modules}.radix_cache").RadixKey
    options = import_module(f"{modules}.cache_init_params").CacheInitParams
    component = import_module(f"{modules}.unified_cache.component_type").ComponentType
    torch = import_module("torch")
    torch.set_num_threads(1)
    core = tree(options(False, None, None, BLOCK_SIZE, tree_components=(component.FULL,)))
    clock = time.perf_counter_ns

    def job(prompt: bytes, decoded: bytes) -> Steps:
        ids, whole = (array("q", array("I", one)) for one in (prompt, prompt + decoded))
        whole = whole[: len(whole) // BLOCK_SIZE * BLOCK_SIZE]
        slots = torch.arange(len(whole), dtype=torch.int64)  # the allocator's, not measured
        begun = clock()
        found = core.match_prefix(base.MatchPrefixParams(key=make_key(ids)))
        lock = core.inc_lock_ref(found.last_device_node)
        locked = clock()
        params = base.InsertParams(
            key=make_key(whole), value=slots, prev_prefix_len=found.device_prefix_len
        )
        step = core.begin_insert(params)
        while step.result is None:
            step = core.resume_insert()
        core.end_insert()
        inserted = clock()
        core.dec_lock_ref(found.last_device_node, lock.to_dec_params())
        return _parts(begun, locked, inserted, clock())

    return metadata.version("sglang"), job


def _parts(*marks: int) -> Steps:
    one, two, three = ((marks[i + 1] - marks[i]) / 1e3 for i in range(3))
    return one, two, three


def serve(kind: str, *, quick: bool) -> None:
    """Store the chats, then do a round for each length that is asked for; the child's side."""
    about, job = sglang_core() if kind == SGLANG else our_core()
    lengths = LENGTHS[:2] if quick else LENGTHS
    workload = build(120_000 if quick else 1_200_000, lengths, 4 if quick else 16)
    for chat in workload.sequences:
        job(chat, b"")
    gc.collect()
    gc.freeze()
    gc.disable()
    fresh = random.Random(0)
    print(about, flush=True)
    for line in sys.stdin:
        done = [
            job(
                probe.stored + fresh.randbytes(FRESH_TOKENS * TOKEN_BYTES),
                fresh.randbytes(DECODED_TOKENS * TOKEN_BYTES),
            )
            for probe in workload.probes[int(line)]
        ]
        told = [statistics.median(map(sum, done)), *map(statistics.median, zip(*done, strict=True))]
        print(*told, flush=True)


# ------------------------------------------------------------------------------------- the parent


class Subject:
    """One core in a process of its own."""

    def __init__(self, name: str, root: Path | None, python: str, *, quick: bool) -> None:
        self.name, self._root = name, root
        # The base's benchmarks are not asked for: what is measured is measured by this one.
        path = [str(one) for one in (root, ROOT / "bench") if one is not None]
        command = [python, "-P", "-m", "prefixcache_bench.speed.core", "--child", name]
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(
                tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
            )
            try:
                process = subprocess.Popen(
                    command + ["--quick"] * quick,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    text=True,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
                )
            except OSError as error:
                raise NotMeasured(f"{python} does not start: {error.strerror}") from error
            self._process = stack.enter_context(process)
            self._held = stack.pop_all()
        self.rounds: dict[int, list[list[float]]] = {}

    def start(self) -> None:
        """Wait until the chats are stored, and see that it is this core that has stored them."""
        self.about = self._answer().strip()
        if self._root is None:
            return
        runs = Path(self.about)
        if not runs.is_relative_to(self._root.resolve()):
            raise NotMeasured(f"Python finds {runs} before what is in {self._root}")
        if self.name == COMPILED and runs.suffix == ".py":
            raise NotMeasured(f"Python runs {runs.name} in place of what was compiled")
        self.about = f"runs {runs.name}"

    def measure(self, length: int) -> None:
        """Do a round."""
        told = cast("IO[str]", self._process.stdin)
        told.write(f"{length}\n")
        told.flush()
        self.rounds.setdefault(length, []).append([*map(float, self._answer().split())])

    def _answer(self) -> str:
        line = cast("IO[str]", self._process.stdout).readline()
        if line.endswith("\n"):
            return line
        self._process.wait()
        self._log.seek(0)
        last = [text.strip() for text in self._log if text.strip()]
        raise NotMeasured(last[-1] if last else "it ended, and said nothing")

    def close(self) -> None:
        """End the process."""
        self._held.close()


class Row(NamedTuple):
    """What all rounds of one subject show of one part of a job."""

    low: float
    middle: float
    high: float


def row(subject: Subject, length: int, part: int) -> Row:
    """Sum up; part 0 is the whole job."""
    figures = [one[part] for one in subject.rounds[length]]
    return Row(min(figures), statistics.median(figures), max(figures))


def table(subjects: list[Subject]) -> Iterator[str]:
    """Draw what was measured as lines of text: first the whole jobs, then their parts."""
    width = max(len(subject.name) for subject in subjects) + 2
    yield f"{'µs per job: min / median / max':<34}" + "".join(
        f"{subject.name:>{max(width, 24)}}" for subject in subjects
    )
    parts = ("whole job", "acquire", "commit", "release")
    for length in subjects[0].rounds:
        for part, name in enumerate(parts):
            shown = (row(subject, length, part) for subject in subjects)
            yield f"{f'{name}, {length:,} tokens':<34}" + "".join(
                f"{f'{low:.1f} / {middle:.1f} / {high:.1f}':>{max(width, 24)}}"
                for low, middle, high in shown
            )


def ratios(subjects: list[Subject]) -> Iterator[str]:
    """Compare the medians of whole jobs, and those of 4,000 tokens with their goals."""
    by_name = {subject.name: subject for subject in subjects}
    for (ours, theirs), goal in GOALS.items():
        if ours not in by_name or theirs not in by_name:
            continue
        for length in by_name[ours].rounds:
            us, them = (row(by_name[name], length, 0) for name in (ours, theirs))
            ratio = us.middle / them.middle
            line = f"{ours} / {theirs}, {length:,} tokens: {ratio:.2f}x"
            if length == LENGTHS[1]:
                line += f"  goal <= {goal:g}x {'met' if ratio <= goal else 'MISSED'}"
            yield f"{line}  (of the minima {us.low / them.low:.2f}x)"


def measure(options: argparse.Namespace) -> int:
    """Measure the sides in turn, and print."""
    rounds = 5 if options.quick else options.rounds
    python = options.sglang or os.environ.get(PYTHON_VARIABLE)
    with sources_alone() as (pure, compiled), contextlib.ExitStack() as stack:
        wanted: list[tuple[str, Path | None, str]] = [(PURE, pure, sys.executable)]
        if not options.pure:
            wanted.append((COMPILED, compiled, sys.executable))
        if options.base:
            wanted.append((BASE, options.base.resolve(), sys.executable))
        if python:
            wanted.append((SGLANG, None, python))
        else:
            print(f"{SGLANG}: not measured: {ABSENT}")
        subjects = []
        for name, root, interpreter in wanted:
            try:
                if name == COMPILED:
                    compile_core(compiled)
                subject = Subject(name, root, interpreter, quick=options.quick)
                stack.callback(subject.close)
                subject.start()
            except NotMeasured as reason:
                print(f"{name}: not measured: {reason}")
                continue
            print(f"{name}: {subject.about}", flush=True)
            subjects.append(subject)
        for turn in range(rounds):
            for length in LENGTHS[:2] if options.quick else LENGTHS:
                for subject in subjects if turn % 2 else reversed(subjects):
                    subject.measure(length)
        print("\n".join([*table(subjects), *ratios(subjects)]))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.core", description=__doc__
    )
    parser.add_argument("--base", type=Path, help="a checkout of another commit")
    parser.add_argument("--sglang", help="a Python that has SGLang")
    parser.add_argument("--pure", action="store_true", help="do not compile")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="fewer chats, five rounds")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        serve(options.child, quick=options.quick)
        return 0
    # Not for the children: another Python has nothing of ours but this package.
    from prefixcache_bench.speed.signals import ending_in_order

    with ending_in_order():
        return measure(options)


if __name__ == "__main__":
    raise SystemExit(main())
