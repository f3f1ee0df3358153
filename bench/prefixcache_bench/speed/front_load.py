"""Load `prefixcache up` for minutes by vLLM's own benchmark, beside clients that leave at random.

    python -m prefixcache_bench.speed.front_load [--python PYTHON] [--minutes 5] [--concurrency 4]
                                                 [--leavers 3] [--seed 0] [--publish]

```
vllm bench serve     turns of 32 chats over HTTP, streamed; all of them must be answered
leavers              ask the three paths, streamed or not, and leave: before the first token, in the
                     middle of the stream, with the body half sent; some stay to the end
```
Two workers with the demo's model on one pool.  `vllm bench serve` is run by the Python that has
vLLM; its engine is not.

Exit code 0 only if everything that nobody left was answered, and nothing is left behind when all
are gone: no request, no answer in a worker, no lease, nothing quarantined, nobody waits, all
invariants of the pool hold; and if the private memory of no process grows any more.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import prefixcache
from prefixcache.plain_json import json_text
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.speed.endpoint import Endpoint, endpoint
from prefixcache_bench.speed.signals import ending_in_order
from prefixcache_bench.speed.vllm import ABSENT
from prefixcache_bench.speed.vllm_figures import Say
from prefixcache_bench.speed.vllm_load import Told, settled, turn
from prefixcache_bench.speed.vllm_peer import PYTHON_VARIABLE, VllmFailed
from prefixcache_worker import smollm2

REQUESTS: Final = 32
"""Of one turn."""
LEFT_WITHIN_S: Final = 60.0
SAMPLE_S: Final = 2.0
GROWTH: Final = 0.05
"""Of private memory, from the second third of the time to the last: more is a leak."""
SLACK_MIB: Final = 16.0
"""What arenas take in one piece; a process of 60 MiB would seem to grow by a quarter."""
DOCUMENT: Final = Path("docs/clients.md")
_TIMEOUT_S: Final = 600.0
_TOLD: Final = (
    *("generated_tokens_total", "cached_tokens_total", "prompt_tokens_total"),
    *("clients_gone_total", "workers_started_total"),
)
_PATHS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_WAYS: Final = ("stays", "leaves a stream", "leaves before the first token", "leaves its body")


def bench_command(
    python: str, serving: Endpoint, tokenizer: str, concurrency: int, seed: int, result: Path
) -> list[str]:
    """Write one turn of chats with prefixes of their own; the first chunk is the first token."""
    return [
        *(python, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
        *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--base-url", serving.url.removesuffix("/v1"), "--model", smollm2.NAME),
        *("--tokenizer", tokenizer, "--dataset-name", "prefix_repetition"),
        *("--prefix-repetition-prefix-len", "256", "--prefix-repetition-suffix-len", "32"),
        *("--prefix-repetition-num-prefixes", "4", "--prefix-repetition-output-len", "32"),
        *("--num-prompts", str(REQUESTS), "--max-concurrency", str(concurrency)),
        *("--seed", str(seed), "--ignore-eos", "--disable-tqdm", "--save-result"),
        "--save-detailed",  # tells why a request failed
        *("--result-dir", str(result.parent), "--result-filename", result.name),
    ]


@dataclass
class Leavers:
    """Clients that ask one thing after another, and leave most of it.

    Args:
        url: base URL of the endpoint.
        model: what is asked.
        seed: of what they do.
    """

    url: str
    model: str
    seed: int = 0
    did: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def running(self, count: int) -> Iterator[None]:
        """Let so many of them be there."""
        threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._end.set()
            for thread in threads:
                thread.join()

    def _run(self, number: int) -> None:
        draw = random.Random(self.seed * 1000 + number)
        while not self._end.is_set():
            way = draw.choice(_WAYS)
            path = draw.choice(_PATHS)
            try:
                self._ask(way, path, draw)
            except Exception as error:  # noqa: BLE001 - it is what is looked for
                with self._guard:
                    self.wrong.append(f"{way} at {path}: {type(error).__name__}: {error}")
            with self._guard:
                self.did[way] += 1

    def _ask(self, way: str, path: str, draw: random.Random) -> None:
        streams = way == "leaves a stream" or draw.random() < 0.5
        # Who leaves asks for what takes longer than it stays.
        body = self.body(path, draw, 250 if way.startswith("leaves") else 16, stream=streams)
        raw = json_text(body).encode()
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=_TIMEOUT_S)
        with contextlib.closing(connection):
            connection.putrequest("POST", path)
            connection.putheader("content-type", "application/json")
            connection.putheader("content-length", str(len(raw)))
            half = draw.randrange(len(raw)) if way == "leaves its body" else len(raw)
            connection.endheaders(raw[:half])
            if way == "leaves its body":
                return
            if way == "leaves before the first token":
                time.sleep(draw.uniform(0.0, 0.3))
                return
            answer = connection.getresponse()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status} {answer.read(500)!r}")
            if way == "leaves a stream":
                for _ in range(draw.randrange(1, 30)):
                    answer.readline()
                return
            check_whole(answer.read(), streams=streams)

    def body(self, path: str, draw: random.Random, count: int, *, stream: bool) -> dict[str, Any]:
        """Write a request, of a few prompts that many have, and an end of its own."""
        prompt = f"Story {draw.randrange(4)}. " + "Once upon a time. " * draw.randrange(1, 60)
        prompt += str(draw.random())
        told: dict[str, Any] = {"model": self.model, "stream": stream, "ignore_eos": True}
        if path.endswith("responses"):
            return told | {"input": prompt, "max_output_tokens": count}
        if path.endswith("chat/completions"):
            return told | {"messages": [{"role": "user", "content": prompt}], "max_tokens": count}
        return told | {"prompt": prompt, "max_tokens": count}


def check_whole(data: bytes, *, streams: bool) -> None:
    r"""See that an answer has come to its end.

    >>> check_whole(b'{"usage": {}}', streams=False)
    >>> check_whole(b'data: {}\n\ndata: [DONE]\n\n', streams=True)
    >>> check_whole(b'data: {}\n\n', streams=True)
    Traceback (most recent call last):
        ...
    RuntimeError: a stream without its end: b'data: {}\n\n'
    """
    if streams:
        if not (data.endswith(b"data: [DONE]\n\n") or b"event: response.incomplete\n" in data):
            raise RuntimeError(f"a stream without its end: {data[-200:]!r}")
    elif "usage" not in json.loads(data):
        raise RuntimeError(f"an answer without its usage: {data[-200:]!r}")


@dataclass
class Memory:
    """Private memory of each process, as time passes."""

    mib: dict[str, list[float]] = field(default_factory=dict)

    @contextlib.contextmanager
    def watched(self, pids: Mapping[str, int]) -> Iterator[None]:
        """Look every `SAMPLE_S`."""
        end = threading.Event()

        def look() -> None:
            while not end.wait(SAMPLE_S):
                for name, pid in pids.items():
                    if (found := private_mib(pid)) is not None:
                        self.mib.setdefault(name, []).append(found)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def rows(self) -> list[str]:
        """Say how much each has, in the second third and in the last."""
        return [
            f"{name}: {before:.0f} MiB private, then {after:.0f}"
            for name, before, after in self._thirds()
        ]

    def growing(self) -> list[str]:
        """Say whose memory still grows.

        >>> Memory({"w1": [100.0, 300.0, 300.0], "front": [60.0, 60.0, 160.0]}).growing()
        ['front grows from 60 to 160 MiB']
        """
        return [
            f"{name} grows from {before:.0f} to {after:.0f} MiB"
            for name, before, after in self._thirds()
            if after > before * (1 + GROWTH) + SLACK_MIB
        ]

    def _thirds(self) -> Iterator[tuple[str, float, float]]:
        for name, values in self.mib.items():
            third = max(1, len(values) // 3)
            middle = values[third : 2 * third] or values
            yield name, statistics.median(middle), statistics.median(values[-third:])


def private_mib(pid: int) -> float | None:
    """Memory that is the process' own, or None if it is no more."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
    return found[0] / 1024 if found else None


def processes(serving: Endpoint) -> dict[str, int]:
    """Give the processes of an endpoint by what they are."""
    found = {"front": serving.process.pid}
    found |= {one["worker"]: one["pid"] for one in serving.workers()}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError, ValueError):
            if entry.name.isdecimal():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if parent == found["front"] and b"serve" in words:
                    found["service"] = int(entry.name)
    return found


def quiet(serving: Endpoint) -> list[str]:
    """Give what the front still has when all clients are gone."""
    deadline = time.monotonic() + LEFT_WITHIN_S
    names = ("requests_open", "answers_running", "answers_waiting")
    while True:
        left = [f"{found:g} {name}" for name in names if (found := serving.meter(name))]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def load(options: argparse.Namespace, say: Say) -> list[str]:
    """Run everything; give what is wrong.

    Raises:
        VllmFailed: the benchmark did not run.
    """
    tokenizer = str(smollm2.folder())
    told: list[Told] = []
    memory = Memory()
    say.progress("two workers start")
    with (
        endpoint("--memory", "512MiB") as serving,
        tempfile.TemporaryDirectory(prefix="prefixcache-load-") as folder,
        prefixcache.connect(serving.target) as client,
    ):
        leavers = Leavers(serving.url, smollm2.NAME, options.seed)
        pids = processes(serving)
        began = time.monotonic()
        with memory.watched(pids), leavers.running(options.leavers):
            for number in itertools.count():
                if number and time.monotonic() - began >= 60 * options.minutes:
                    break
                say.progress(f"turn {number + 1}")
                result = Path(folder) / f"turn-{number}.json"
                command = bench_command(
                    options.python,
                    serving,
                    tokenizer,
                    options.concurrency,
                    options.seed + number,
                    result,
                )
                (found,) = turn({result: command}, options.python)
                told.append(Told.by_vllm(found))
        took = time.monotonic() - began
        left = [*quiet(serving), *settled(client, 0)]
        meters = {name: serving.meter(name) for name in _TOLD}
        died = meters["workers_started_total"] - len(serving.workers())
    completed, failed = sum(one.completed for one in told), sum(one.failed for one in told)
    say(f"vllm bench serve: {completed:,} chats in {len(told)} turns; {failed} failed")
    did = ", ".join(f"{count:,} {way}" for way, count in sorted(leavers.did.items()))
    say(f"beside it: {did}")
    say(
        f"{took:.0f} s; {meters['generated_tokens_total']:,.0f} tokens generated, "
        f"{meters['cached_tokens_total']:,.0f} of {meters['prompt_tokens_total']:,.0f} of prompts "
        f"cached; {meters['clients_gone_total']:,.0f} clients left before their end"
    )
    for row in memory.rows():
        say(row)
    wrong = list(dict.fromkeys(leavers.wrong))[:20]
    if failed or completed != REQUESTS * len(told):
        wrong.append(f"vllm bench serve: {completed} of {REQUESTS * len(told)} were answered")
        wrong += dict.fromkeys(one[:300] for turn_ in told for one in turn_.errors)
    if not meters["clients_gone_total"]:
        wrong.append("nobody left: nothing was shown")
    if died:
        wrong.append(f"{died:g} workers were started again")
    return wrong + [f"left behind: {what}" for what in left] + memory.growing()


def main(argv: list[str] | None = None) -> int:
    """Load, look, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(prog="prefixcache_bench.speed.front_load", allow_abbrev=False)
    parser.add_argument("--python", default=os.environ.get(PYTHON_VARIABLE), metavar="PYTHON")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--concurrency", type=int, default=4, help="chats at once")
    parser.add_argument("--leavers", type=int, default=3, help="clients that leave, at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--publish", action="store_true", help=f"put the lines into {DOCUMENT}")
    options = parser.parse_args(argv)
    if not options.python:
        print(ABSENT, file=sys.stderr)
        return 1
    say = Say()
    try:
        wrong = load(options, say)
    except VllmFailed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    for what in wrong:
        say(f"WRONG: {what}")
    say("no error, nothing left behind" if not wrong else f"{len(wrong)} things are wrong")
    if options.publish:
        words = f"$ python -m prefixcache_bench.speed.front_load --minutes {options.minutes:g}"
        publish(DOCUMENT, "load", "\n".join([words, *say.lines]))
    return bool(wrong)


if __name__ == "__main__":
    with ending_in_order():
        raise SystemExit(main())
