"""What a lost worker and a client that leaves cost: gaps, tokens computed again, blocks.

    python -m prefixcache_bench.speed.takeover [--quick] [--rounds 5] [--seed 0] [--publish]

`prefixcache up` with two workers on the demo model (bfloat16, one thread each) streams an answer
behind a prompt of 1,000 tokens that nobody has seen; both have answered before.  After 24 tokens
its worker is

```
killed     SIGKILL: nobody says anything any more; the pipe ends
stopped    SIGSTOP: it lives, and holds its blocks
drained    SIGHUP to the front: each worker is replaced, one after the other
```
The gap is the longest time between two tokens from then on, in milliseconds and in median steps of
those before.  Tokens computed again are the front's own count.  Then clients leave, in the middle
of a stream, or of an answer that is not streamed: the time is from the closed connection until the
service has lent no block to anybody.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import prefixcache
from prefixcache.client import Client
from prefixcache_bench.speed.endpoint import Endpoint, endpoint, random_prompt, token_times
from prefixcache_bench.speed.signals import ending_in_order
from prefixcache_bench.speed.vllm import publish
from prefixcache_bench.speed.vllm_figures import Say, Series

DOCUMENT: Final = Path("docs/benchmarks.md")
TITLE: Final = "A worker is lost, a client leaves"
PROMPT: Final = 1000
AT: Final = 24
"""Tokens that are told before the worker is lost."""
COUNT: Final = 64
STEPS_GOAL, MORE_MS_GOAL, AGAIN_GOAL, LEFT_MS_GOAL = 3, 150.0, 17, 300.0


@dataclass(frozen=True, slots=True)
class Gap:
    """One answer whose worker was lost."""

    ms: float
    step_ms: float
    again: int
    moved: int

    @property
    def steps(self) -> float:
        """The gap in steps."""
        return self.ms / self.step_ms

    @property
    def over_ms(self) -> float:
        """What it is beyond three steps."""
        return self.ms - STEPS_GOAL * self.step_ms


def holder(up: Endpoint) -> int:
    """Give the pid of the worker that has the only answer."""
    return next(int(one["pid"]) for one in up.workers() if one["running"])


def killed(up: Endpoint) -> None:
    """Kill the worker that answers."""
    os.kill(holder(up), signal.SIGKILL)


def drained(up: Endpoint) -> None:
    """Have all workers replaced."""
    up.process.send_signal(signal.SIGHUP)


def lose(up: Endpoint, draw: random.Random, how: Callable[[Endpoint], int | None]) -> Gap:
    """Stream an answer whose worker is lost in the middle."""
    moved, again = up.meter("moved_total"), up.meter("recomputed_tokens_total")
    body = {
        "model": "smollm2",
        "prompt": list(random_prompt(draw, PROMPT)),
        "max_tokens": COUNT,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    connection = up.send(body)
    answer = connection.getresponse()
    times: list[float] = []
    stopped = None
    for now in token_times(answer):
        times.append(now)
        if len(times) == AT:
            stopped = how(up)
    connection.close()
    if stopped:
        os.kill(stopped, signal.SIGCONT)
    steps = [b - a for a, b in pairwise(times[: AT + 1])]
    gap = max(b - a for a, b in pairwise(times[AT - 1 :]))
    return Gap(
        1e3 * gap,
        1e3 * statistics.median(steps[:-1]),
        int(up.meter("recomputed_tokens_total") - again),
        int(up.meter("moved_total") - moved),
    )


def stop(up: Endpoint) -> int:
    """Stop the worker that answers; give its pid, so that it can be woken up."""
    pid = holder(up)
    os.kill(pid, signal.SIGSTOP)
    return pid


HOW: Final[dict[str, Callable[[Endpoint], int | None]]] = {
    "killed": killed,
    "stopped": stop,
    "drained": drained,
}


def leave(up: Endpoint, client: Client, draw: random.Random, *, stream: bool) -> float:
    """Let a client leave in the middle of its answer; give ms until all blocks are back."""
    body = {
        "model": "smollm2",
        "prompt": list(random_prompt(draw, PROMPT)),
        "max_tokens": 4 * COUNT,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }
    connection = up.send(body)
    while True:  # until it has written something
        written = [a["generated"] for one in up.workers() for a in one["answers"]]
        if written and written[0] >= 8:
            break
        time.sleep(0.01)
    assert connection.sock is not None
    connection.sock.close()
    connection.close()
    left_s = time.monotonic()
    while (seen := client.snapshot()).num_leases or seen.private:
        time.sleep(0.002)
    return 1e3 * (time.monotonic() - left_s)


def warm_up(up: Endpoint, draw: random.Random) -> None:
    """Have every worker answer: the first steps of a process are slower than all others."""
    asked = [
        up.send(
            {
                "model": "smollm2",
                "prompt": list(random_prompt(draw, 64)),
                "max_tokens": 16,
                "temperature": 0,
                "ignore_eos": True,
            }
        )
        for _ in range(2 * len(up.workers()))
    ]
    for connection in asked:
        connection.getresponse().read()
        connection.close()


def measure(rounds: int, seed: int, say: Say) -> None:
    """Run it all and print it."""
    draw = random.Random(seed)
    say(f"gap in ms, min / median / max of {rounds}; a step is the median of those before it")
    say(f"{'worker':<9} {'gap ms':>22} {'in steps':>18} {'step ms':>8} {'computed again':>15}")
    worst_over, most_again = 0.0, 0
    with endpoint("--memory", "1GiB") as up:
        for name, how in HOW.items():
            found = []
            for number in range(rounds):
                say.progress(f"{name}, round {number + 1}")
                warm_up(up, draw)
                found.append(lose(up, draw, how))
                time.sleep(0.5)  # who was drained or killed is noticed by then
                if name == "drained":
                    up.until("all workers are new")
                up.wait_ready()
            again = [one.again for one in found]
            say(
                f"{name:<9} {Series([one.ms for one in found]).shown(0):>22} "
                f"{Series([one.steps for one in found]).shown(1):>18} "
                f"{statistics.median(one.step_ms for one in found):>8.0f} "
                f"{f'{min(again)} - {max(again)}':>15}"
            )
            worst_over = max(worst_over, statistics.median(one.over_ms for one in found))
            # A rolling restart may move an answer twice.
            most_again = max(most_again, *(one.again // max(1, one.moved) for one in found))
        say()
        left = {}
        with prefixcache.connect(up.target) as client:
            for name, stream in (("streamed", True), ("whole", False)):
                say.progress(f"a client leaves, {name}")
                left[name] = Series([leave(up, client, draw, stream=stream) for _ in range(rounds)])
        for name, series in left.items():
            say(f"client of a {name} answer leaves: blocks back after {series.shown(0)} ms")
    say()
    say.goal("gap beyond three steps, ms, worst median", worst_over, MORE_MS_GOAL)
    say.goal("tokens computed again, most", float(most_again), float(AGAIN_GOAL))
    worst = max(series.median for series in left.values())
    say.goal("blocks back after a client left, ms", worst, LEFT_MS_GOAL)


def main(argv: list[str] | None = None) -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="prefixcache_bench.speed.takeover", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--publish", action="store_true", help=f"write into {DOCUMENT}")
    options = parser.parse_args(argv)
    say = Say()
    measure(1 if options.quick else options.rounds, options.seed, say)
    if options.publish:
        typed = sys.argv[1:] if argv is None else argv
        words = " ".join(["python -m prefixcache_bench.speed.takeover", *typed])
        publish(TITLE, say.lines, words, DOCUMENT)
    return 0


if __name__ == "__main__":
    with ending_in_order():
        raise SystemExit(main())
