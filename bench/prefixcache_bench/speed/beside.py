"""Look-ups of one client while somebody else is busy: what they take, the goal, and the table.

```
this process          a service ── idle ── another one is busied ── this one is
another process       lookup, pause of 5 ms, lookup, …    each time: min, median, p99, max
```
The goal: nothing takes more than 50 ms, and the p99 is at most three times that of the same service
when it idles.  Beside it stands what the machine alone makes of it, while another service is
busied: where two cores are shared with somebody who is busy in bursts, whoever wakes up may wait
for a slice of the scheduler's, a few ms, although his service has nothing to do with the other's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import prefixcache
from prefixcache.errors import CacheError
from prefixcache.plain_json import json_text
from prefixcache.types import Namespace, pack
from prefixcache_bench.reports.figures import publish

LAYOUT = "1x1x1:bfloat16"
BLOCK = 16
MEMORY = "4MiB"
"""65,536 blocks."""
HERE = Namespace("m")
DOCUMENT = Path("docs/reliability.md")
GOAL_MS, GOAL_RATIO = 50.0, 3.0


class Times(NamedTuple):
    """Of look-ups, in ms."""

    least: float
    median: float
    p99: float
    most: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What a probe saw."""

    times: Times
    num_failed: int
    """Look-ups that were not answered."""
    new_ms: float
    """Until a new client had its first answer, at the longest; 0 if none was asked for."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way to be busy."""

    name: str
    idle: Times
    beside: Times
    """While another service is busied."""
    under: Times
    """While this one is."""
    num_failed: int

    @property
    def verdict(self) -> str:
        """Whether the goal is met; or, of what the service adds to the machine's share of it."""
        if self.num_failed:
            return "missed"
        if self.under.most <= GOAL_MS and self.under.p99 <= GOAL_RATIO * self.idle.p99:
            return "met"
        return "by machine" if self.under.p99 <= GOAL_RATIO * self.beside.p99 else "missed"

    def more(self) -> str:
        """Give what else the table says of this row."""
        return ""


@contextlib.contextmanager
def probed(target: str, seen: list[Seen], token: str = "") -> Iterator[None]:
    """Have another process look up meanwhile; with a token, new clients come now and then, too."""
    command = [sys.executable, "-m", "prefixcache_bench.speed.beside", target, token]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        times, num_failed, new_ms = json.loads(process.communicate()[0])
        seen.append(Seen(Times(*times), num_failed, new_ms))


def probe(target: str, token: str) -> None:
    """Look up until the input ends; print what was seen."""
    took, new, failed = [], [0.0], []
    tokens = pack(range(BLOCK))
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    def ask(client: prefixcache.Client) -> None:
        try:
            client.lookup(HERE, tokens)
        except CacheError as error:
            failed.append(error)

    def come() -> None:
        while token and not ended.wait(0.5):
            began = perf_counter()
            with prefixcache.connect(target, token=token, timeout_s=60.0) as client:
                ask(client)
            new.append(1e3 * (perf_counter() - began))

    with prefixcache.connect(target, token=token or None, timeout_s=60.0) as client:
        client.lookup(HERE, tokens)
        print("ready", flush=True)
        threading.Thread(target=wait, daemon=True).start()
        newcomer = threading.Thread(target=come)
        newcomer.start()
        while not ended.wait(0.005):
            began = perf_counter()
            ask(client)
            took.append(1e3 * (perf_counter() - began))
        newcomer.join()
    took.sort()
    last = len(took) - 1
    times = Times(took[0], took[last // 2], took[round(last * 0.99)], took[last])
    print(json_text([times, len(failed), max(new)]))


def table(rows: Iterable[Row], more: str) -> str:
    """Write the rows; `more` is the head of what they say besides."""
    lines = [
        f"{'min, median, p99, max in ms':<38}{'idle':^28}  {'beside another':^28}  "
        f"{'meanwhile':^28}  p99 to idle, beside{more}  goal"
    ]
    for row in rows:
        idle, beside, under = (
            "".join(f"{one:>7.1f}" for one in each) for each in (row.idle, row.beside, row.under)
        )
        ratios = f"x {row.under.p99 / row.idle.p99:>5.1f}  x {row.under.p99 / row.beside.p99:>5.1f}"
        lines.append(
            f"{row.name:<38}{idle}  {beside}  {under}  {ratios:<19}{row.more()}  {row.verdict}"
        )
    return "\n".join(lines)


def options_of(name: str, described: str, cases: Iterable[str]) -> argparse.ArgumentParser:
    """Give the options of the benchmark of that name."""
    parser = argparse.ArgumentParser(
        prog=f"prefixcache_bench.speed.{name}", description=described, allow_abbrev=False
    )
    cases = list(cases)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--only", nargs="*", choices=cases, default=cases, help="of these")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--publish", action="store_true", help=f"put the table into {DOCUMENT}")
    return parser


def report(
    name: str, options: argparse.Namespace, measure: Callable[[str, float], Row], more: str = ""
) -> None:
    """Measure one case after the other, print, and publish if asked to."""
    rows: list[Row] = []
    for case in options.only:
        rows.append(measure(case, options.seconds))
        lines = table(rows, more).splitlines()
        print(*(lines[-1:] if rows[1:] else lines), sep="\n", flush=True)
    if options.json:
        options.json.write_text(json_text([asdict(row) for row in rows], indent=2))
    if options.publish:
        publish(DOCUMENT, name, f"$ python -m prefixcache_bench.speed.{name}\n{table(rows, more)}")


if __name__ == "__main__":
    probe(*sys.argv[1:])
