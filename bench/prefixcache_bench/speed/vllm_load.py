"""Load two vLLM engines on one pool for minutes by vLLM's own benchmark, and look for leaks.

    python -m prefixcache_bench.speed.vllm_load [--python PYTHON] [--minutes 10] [--concurrency 8]
                                                [--seed 0] [--guidellm PROGRAM]

A service, and two engines in place that `prefixcache vllm` starts, each behind vLLM's HTTP server.
`vllm bench serve` asks both at once, in turns of 64 requests, with prefixes that both engines see:
what one has computed, the other reads; where there is a GuideLLM, every other turn is its.  It goes
on until the time is over, and a turn is finished.

Exit code 0 only if all requests were answered and nothing is left behind: with the engines idle no
lease but those of their spare blocks, and when they have ended none at all; nobody waits, nothing
is quarantined, and all invariants of the pool hold.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import prefixcache
from prefixcache.client import Client
from prefixcache_bench.reports.provenance import commit, processor
from prefixcache_bench.speed.served import served
from prefixcache_bench.speed.signals import ending_in_order, kill_session, tied_to_this
from prefixcache_bench.speed.vllm import ABSENT
from prefixcache_bench.speed.vllm_figures import Say
from prefixcache_bench.speed.vllm_fleet import DTYPE, free_port, layout_of, left_behind
from prefixcache_bench.speed.vllm_peer import (
    BLOCK_SIZE,
    PYTHON_VARIABLE,
    VllmFailed,
    environment,
)

ENGINES: Final = 2
REQUESTS: Final = 64
"""Of one engine in one turn."""
GUIDELLM_VARIABLE: Final = "PREFIXCACHE_GUIDELLM"
START_S, SETTLE_S, TURN_S, END_S = 600.0, 60.0, 1800.0, 60.0
"""Longer than this nothing takes on any machine: it hangs."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a turn of one engine made of its requests."""

    completed: int
    failed: int
    tokens: int
    errors: tuple[str, ...] = ()
    """What the program says of those that failed."""

    @classmethod
    def by_vllm(cls, told: Mapping[str, Any]) -> Told:
        """Read what `vllm bench serve --save-result` writes.

        >>> Told.by_vllm({"completed": 3, "failed": 1, "total_output_tokens": 90})
        Told(completed=3, failed=1, tokens=90, errors=())
        """
        errors = tuple(one for one in told.get("errors", ()) if one)
        return cls(told["completed"], told["failed"], told["total_output_tokens"], errors)

    @classmethod
    def by_guidellm(cls, told: Mapping[str, Any]) -> Told:
        """Read what `guidellm run --output kind=json` writes; what it did not wait for, failed."""
        metrics = told["benchmarks"][0]["metrics"]
        totals = metrics["request_totals"]
        tokens = metrics["output_token_count"]["successful"]["total_sum"]
        requests = told["benchmarks"][0].get("requests") or {}
        errors = tuple(
            f"{kind}: {one['info'].get('error') or 'without a reason'}"
            for kind in ("errored", "incomplete")
            for one in requests.get(kind) or ()
        )
        failed = totals["total"] - totals["successful"]
        return cls(totals["successful"], failed, int(tokens), errors)


@dataclass(slots=True)
class Tally:
    """What the turns of one program said."""

    completed: int = 0
    failed: int = 0
    tokens: int = 0
    turns: int = 0
    errors: list[str] = field(default_factory=list)

    def take(self, told: Told) -> None:
        """Add a turn of one engine.

        >>> tally = Tally()
        >>> tally.take(Told(completed=3, failed=1, tokens=90))
        >>> tally
        Tally(completed=3, failed=1, tokens=90, turns=1, errors=[])
        """
        self.completed += told.completed
        self.failed += told.failed
        self.tokens += told.tokens
        self.turns += 1
        self.errors += told.errors

    def wrong(self, name: str) -> list[str]:
        """Say what is wrong: every turn asks the same number of requests.

        >>> Tally(completed=127, failed=1, turns=2).wrong("vllm bench serve")
        ['vllm bench serve: 1 failed and 127 were answered of 128 requests']
        >>> Tally(completed=64, turns=1).wrong("vllm bench serve")
        []
        """
        asked = self.turns * REQUESTS
        if self.completed == asked and not self.failed:
            return []
        why = "".join(f"; {one[:500]}" for one in dict.fromkeys(self.errors))
        answered = f"{self.completed} were answered of {asked} requests"
        return [f"{name}: {self.failed} failed and {answered}{why}"]


def settled(client: Client, leases: int) -> list[str]:
    """Give what is left behind, when it is still there after a while."""
    deadline = time.monotonic() + SETTLE_S
    while (found := left_behind(client.snapshot(), leases)) and time.monotonic() < deadline:
        time.sleep(0.5)
    failure = client.check().failure
    return [*found, failure] if failure else found


class Engine:
    """`prefixcache vllm`, started: `ready` before it is asked.

    Args:
        python: the one that has vLLM.
        model: folder of the model.
        target: the service's address.
        log: where it writes.
    """

    def __init__(self, python: str, model: str, target: str, log: Path) -> None:
        port = free_port()
        command = [
            *(python, "-m", "prefixcache.cli", "vllm", model, "--connect", target),
            *("--port", str(port), "--dtype", DTYPE, "--max-model-len", "2048"),
            *("--max-num-seqs", "16", "--served-model-name", "demo", "--enforce-eager"),
        ]
        self.address = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("w", encoding="utf-8") as out:
            self._process = subprocess.Popen(
                tied_to_this(command),
                stdout=out,
                stderr=out,
                env=served_environment(python),
                start_new_session=True,
            )

    def ready(self) -> str:
        """Wait until it answers; give the address of its HTTP server.

        Raises:
            VllmFailed: it does not answer.
        """
        deadline = time.monotonic() + START_S
        while not answers(f"{self.address}/health"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self._log.read_text(encoding="utf-8", errors="replace").strip()
                last = " / ".join(said.splitlines()[-3:])
                raise VllmFailed(f"prefixcache vllm did not start: {last}")
            time.sleep(1)
        return self.address

    def end(self) -> None:
        """End it as a user would, and then whatever of its processes is left."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        kill_session(self._process)


def served_environment(python: str) -> dict[str, str]:
    """Give what an engine behind a server runs in: with its core in a process of its own."""
    found = environment(python, keep_path=True)
    del found["VLLM_ENABLE_V1_MULTIPROCESSING"]
    # As long as clients keep an idle connection (5 s) vLLM does, too: who sends a request in that
    # moment gets no answer, and says so.
    return found | {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60"}


def answers(url: str) -> bool:
    """Whether a server says yes."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - of this machine
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def bench_command(
    python: str, address: str, model: str, concurrency: int, seed: int, result: Path
) -> list[str]:
    """Write one turn: the same seed gives the same prefixes, whoever is asked."""
    return [
        *(python, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"),
        *("--base-url", address, "--model", "demo", "--tokenizer", model),
        *("--dataset-name", "prefix_repetition", "--prefix-repetition-prefix-len", "512"),
        *("--prefix-repetition-suffix-len", "64", "--prefix-repetition-num-prefixes", "8"),
        *("--prefix-repetition-output-len", "32", "--num-prompts", str(REQUESTS)),
        *("--max-concurrency", str(concurrency), "--seed", str(seed), "--ignore-eos"),
        *("--disable-tqdm", "--save-result", "--result-dir", str(result.parent)),
        *("--result-filename", result.name),
    ]


def guidellm_command(
    program: str, address: str, model: str, concurrency: int, seed: int, result: Path
) -> list[str]:
    """Write one turn of GuideLLM's: chats of two turns, with prefixes that the same seed gives."""
    return [
        *(program, "run", "--disable-console", "--seed", f"kind=static,value={seed}"),
        *("--backend", f"kind=openai_http,target={address},model=demo"),
        *("--profile", f"kind=concurrent,streams={concurrency}"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={model}"),
        "--data",
        "kind=synthetic_text,prompt_tokens=64,output_tokens=32,turns=2,prefix_tokens=512,"
        "prefix_count=8",
        *("--output", f"kind=json,path={result}"),
    ]


def turn(commands: Mapping[Path, list[str]], python: str) -> list[dict[str, Any]]:
    """Ask all engines at once, and wait until all have answered.

    Args:
        commands: one for each engine, by the file that it writes what it found to.
        python: the one that has vLLM.

    Raises:
        VllmFailed: a program did not end well.
    """
    said = [result.with_suffix(".log") for result in commands]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command, log in zip(commands.values(), said, strict=True):
            with log.open("w", encoding="utf-8") as out:
                running.append(
                    subprocess.Popen(
                        tied_to_this(command),
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env=served_environment(python),
                        start_new_session=True,
                    )
                )
        deadline = time.monotonic() + TURN_S
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in running:
            kill_session(process)
    for process, command, log in zip(running, commands.values(), said, strict=True):
        if process.returncode:
            last = " / ".join(log.read_text("utf-8", "replace").strip().splitlines()[-3:])
            raise VllmFailed(f"{Path(command[0]).name} ended with {process.returncode}: {last}")
    return [json.loads(result.read_text(encoding="utf-8")) for result in commands]


def load(options: argparse.Namespace, say: Say) -> list[str]:
    """Run everything; give what is wrong.

    Raises:
        VllmFailed: vLLM or its benchmark did not run.
    """
    from prefixcache_worker import smollm2

    model = str(smollm2.folder())
    memory = ("--memory", "1GiB", "--block-size", str(BLOCK_SIZE), "--first-block", "1")
    tallies = {"vllm bench serve": Tally()} | ({"guidellm": Tally()} if options.guidellm else {})
    with (
        served(*memory, layout=layout_of(options.python, model)) as (target, _),
        tempfile.TemporaryDirectory(prefix="prefixcache-load-") as folder,
        prefixcache.connect(target) as client,
    ):
        with contextlib.ExitStack() as stack:
            say.progress(f"{ENGINES} engines start")
            addresses = started(stack, options.python, model, target, Path(folder))
            say(f"{commit()} · {processor()} · {ENGINES} engines in place, {options.minutes} min")
            began = time.monotonic()
            for number in itertools.count():
                if time.monotonic() - began >= 60 * options.minutes and number >= len(tallies):
                    break
                name = list(tallies)[number % len(tallies)]
                say.progress(f"turn {number + 1}: {name}")
                found = turn(
                    commands(options, name, addresses, model, number, Path(folder)), options.python
                )
                read = Told.by_guidellm if name == "guidellm" else Told.by_vllm
                for told in found:
                    tallies[name].take(read(told))
            took = time.monotonic() - began
            idle = [f"engines idle: {what}" for what in settled(client, ENGINES)]
            say.progress("engines end")
        ended = [f"engines ended: {what}" for what in settled(client, 0)]
        counts = client.snapshot()
    for name, tally in tallies.items():
        say(
            f"{name}: {tally.completed:,} requests in {tally.turns} turns of one engine; "
            f"{tally.failed} failed; {tally.tokens:,} tokens generated"
        )
    say(f"{took:.0f} s; {counts.ledger}")
    wrong = [what for name, tally in tallies.items() for what in tally.wrong(name)]
    return wrong + idle + ended


def started(
    stack: contextlib.ExitStack, python: str, model: str, target: str, folder: Path
) -> list[str]:
    """Start the engines, side by side; give their addresses.

    Raises:
        VllmFailed: one does not answer.
    """
    engines = []
    for index in range(ENGINES):
        engines.append(Engine(python, model, target, folder / f"engine-{index}.log"))
        stack.callback(engines[-1].end)
    return [engine.ready() for engine in engines]


def commands(
    options: argparse.Namespace,
    name: str,
    addresses: Sequence[str],
    model: str,
    number: int,
    folder: Path,
) -> dict[Path, list[str]]:
    """Write what a turn runs, by the file that it writes: the same seed at every engine."""
    program, written = (
        (options.guidellm, guidellm_command)
        if name == "guidellm"
        else (options.python, bench_command)
    )
    results = [folder / f"turn-{number}-{index}.json" for index in range(len(addresses))]
    return {
        result: written(program, address, model, options.concurrency, options.seed + number, result)
        for address, result in zip(addresses, results, strict=True)
    }


def main(argv: list[str] | None = None) -> int:
    """Load, look, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(prog="prefixcache_bench.speed.vllm_load", allow_abbrev=False)
    parser.add_argument("--python", default=os.environ.get(PYTHON_VARIABLE), metavar="PYTHON")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once, per engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--guidellm",
        default=os.environ.get(GUIDELLM_VARIABLE),
        metavar="PROGRAM",
        help="GuideLLM 0.8, in an environment of its own",
    )
    options = parser.parse_args(argv)
    if not options.python:
        print(ABSENT, file=sys.stderr)
        return 1
    try:
        with ending_in_order():
            wrong = load(options, Say())
    except VllmFailed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    for what in wrong:
        print(f"WRONG: {what}")
    print("no error, nothing left behind" if not wrong else f"{len(wrong)} things are wrong")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
