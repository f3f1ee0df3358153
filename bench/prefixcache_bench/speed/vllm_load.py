"""Load two vLLM engines on one pool for minutes by vLLM's own benchmark, and look for leaks.

    python -m prefixcache_bench.speed.vllm_load [--python PYTHON] [--minutes 10] [--concurrency 8]
                                                [--seed 0]

A service, and two engines in place that `prefixcache vllm` starts, each behind vLLM's HTTP server.
`vllm bench serve` asks both at once, in turns of 64 requests, with prefixes that both engines see:
what one has computed, the other reads.  It goes on until the time is over, and a turn is finished.

Exit code 0 only if no request failed and nothing is left behind: with the engines idle no lease but
those of their spare blocks, and when they have ended none at all; nobody waits, nothing is
quarantined, and all invariants of the pool hold.  (GuideLLM 0.8.1 is not used: what it requires,
`datasets` and `sanic` among it, is not part of an environment with vLLM.)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import prefixcache
from prefixcache.client import Client
from prefixcache_bench.reports.provenance import commit, processor
from prefixcache_bench.speed.served import served
from prefixcache_bench.speed.vllm import ABSENT
from prefixcache_bench.speed.vllm_figures import Say
from prefixcache_bench.speed.vllm_fleet import DTYPE, layout_of, left_behind
from prefixcache_bench.speed.vllm_peer import (
    BLOCK_SIZE,
    PYTHON_VARIABLE,
    VllmFailed,
    environment,
)

ENGINES: Final = 2
REQUESTS: Final = 64
"""Of one engine in one turn."""
START_S, SETTLE_S = 600.0, 30.0


@dataclass(slots=True)
class Tally:
    """What the turns said."""

    completed: int = 0
    failed: int = 0
    tokens: int = 0
    turns: int = 0

    def take(self, told: Mapping[str, Any]) -> None:
        """Add a turn: what `vllm bench serve --save-result` writes.

        >>> tally = Tally()
        >>> tally.take({"completed": 3, "failed": 1, "total_output_tokens": 90})
        >>> tally
        Tally(completed=3, failed=1, tokens=90, turns=1)
        """
        self.completed += told["completed"]
        self.failed += told["failed"]
        self.tokens += told["total_output_tokens"]
        self.turns += 1


def settled(client: Client, leases: int) -> list[str]:
    """Give what is left behind, when it is still there after a while."""
    deadline = time.monotonic() + SETTLE_S
    while (found := left_behind(client.snapshot(), leases)) and time.monotonic() < deadline:
        time.sleep(0.5)
    failure = client.check().failure
    return [*found, failure] if failure else found


def free_port() -> int:
    """Find a port of this machine's that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def engine(python: str, model: str, target: str, log: Path) -> Iterator[str]:
    """Run `prefixcache vllm` until the end; give the address of its HTTP server.

    Raises:
        VllmFailed: it does not answer.
    """
    port = free_port()
    command = [
        *(python, "-m", "prefixcache.cli", "vllm", model, "--connect", target),
        *("--port", str(port), "--dtype", DTYPE, "--max-model-len", "2048"),
        *("--max-num-seqs", "16", "--served-model-name", "demo", "--enforce-eager"),
    ]
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=served_environment(python), start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not answers(f"{address}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
                raise VllmFailed(f"prefixcache vllm did not start: {' / '.join(last)}")
            time.sleep(1)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def served_environment(python: str) -> dict[str, str]:
    """Give what an engine behind a server runs in: with its core in a process of its own."""
    found = environment(python, keep_path=True)
    del found["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return found


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


def turn(
    options: argparse.Namespace, addresses: list[str], model: str, number: int, folder: Path
) -> list[dict[str, Any]]:
    """Ask all engines at once, and wait until all have answered.

    Raises:
        VllmFailed: vLLM's benchmark did not end well.
    """
    results = [folder / f"turn-{number}-{index}.json" for index in range(len(addresses))]
    running = [
        subprocess.Popen(
            bench_command(
                options.python, address, model, options.concurrency, options.seed + number, result
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=served_environment(options.python),
        )
        for address, result in zip(addresses, results, strict=True)
    ]
    said = [process.communicate()[0] for process in running]
    for process, text in zip(running, said, strict=True):
        if process.returncode:
            last = " / ".join(text.strip().splitlines()[-3:])
            raise VllmFailed(f"vllm bench serve ended with {process.returncode}: {last}")
    return [json.loads(result.read_text(encoding="utf-8")) for result in results]


def load(options: argparse.Namespace, say: Say) -> list[str]:
    """Run everything; give what is wrong.

    Raises:
        VllmFailed: vLLM or its benchmark did not run.
    """
    from prefixcache_worker import smollm2

    model = str(smollm2.folder())
    memory = ("--memory", "1GiB", "--block-size", str(BLOCK_SIZE), "--first-block", "1")
    tally = Tally()
    with (
        served(*memory, layout=layout_of(options.python, model)) as (target, _),
        tempfile.TemporaryDirectory(prefix="prefixcache-load-") as folder,
        prefixcache.connect(target) as client,
    ):
        with contextlib.ExitStack() as stack:
            addresses = [
                stack.enter_context(
                    engine(options.python, model, target, Path(folder) / f"engine-{index}.log")
                )
                for index in range(ENGINES)
            ]
            say(f"{commit()} · {processor()} · {ENGINES} engines in place, {options.minutes} min")
            began = time.monotonic()
            while time.monotonic() - began < 60 * options.minutes:
                for told in turn(options, addresses, model, tally.turns, Path(folder)):
                    tally.take(told)
            took = time.monotonic() - began
            idle = [f"engines idle: {what}" for what in settled(client, ENGINES)]
        ended = [f"engines ended: {what}" for what in settled(client, 0)]
        ledger = client.snapshot().ledger
    say(
        f"{tally.completed:,} requests in {tally.turns} turns of one engine, {took:.0f} s;"
        f" {tally.failed} failed; {tally.tokens:,} tokens generated; {ledger}"
    )
    wrong = [f"{tally.failed} requests failed"] if tally.failed else []
    return wrong + idle + ended


def main(argv: list[str] | None = None) -> int:
    """Load, look, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(prog="prefixcache_bench.speed.vllm_load", allow_abbrev=False)
    parser.add_argument("--python", default=os.environ.get(PYTHON_VARIABLE), metavar="PYTHON")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once, per engine")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if not options.python:
        print(ABSENT, file=sys.stderr)
        return 1
    try:
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
