"""Write the walk-through of docs/operations.md: why was it missed, how much memory would fix it?

    python -m prefixcache_bench.reports.walkthrough [--out docs]

Everything is real: the service, a worker with the demo's model, the demo's chats; what is shown is
what the commands printed.  Between two marks of the page the text is replaced, the rest is left.

```
step 1  a small pool, a date in every system prompt    stat, top, tree, doctor, explain
step 2  the memory that step 1 advises                 stat: nothing is evicted any more
step 3  the date moved to the end                      stat: what was cold is shared
```
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prefixcache
from prefixcache.cli.decoder import Decoder
from prefixcache.client import Client
from prefixcache.plain_json import json_text
from prefixcache.service.pool.model_layout import read_layout
from prefixcache.types import Explanation
from prefixcache_bench.reports.provenance import provenance
from prefixcache_worker import smollm2
from prefixcache_worker.demo import chats

BEGIN = "<!-- walk-through: begin; written by `make operations` -->"
END = "<!-- walk-through: end -->"

_SMALL = "128MiB"
_GHOSTS = "2000"
"""Enough to remember all that is evicted: a ghost takes little more than its tokens."""
_COMMAND = (sys.executable, "-m", "prefixcache.cli")
_COLUMNS = "100"
_DATE = "Today is {day} November 2026, {hour:02}:{minute:02}."


@dataclass
class Session:
    """A service and a worker on it, and what is written about them."""

    folder: Path
    model: Path
    pictures: Path
    hollow: bool
    said: list[str] = field(default_factory=list)

    @property
    def target(self) -> str:
        """Where the service listens."""
        return f"unix:{self.folder}/cache.sock"

    def say(self, text: str) -> None:
        """Write a paragraph."""
        self.said.append(text if text.startswith("```") else textwrap.fill(text, 105))

    def show(self, *arguments: str, most: int = 60, quiet: bool = False) -> str:
        """Run a command as a user would; write it and what it says.  Gives its output."""
        told = subprocess.run(
            [*_COMMAND, *arguments], env=self.environment(), capture_output=True, text=True
        )
        if told.returncode > 1:
            raise SystemExit(f"{arguments}: {told.stderr}")
        out = self.tidy(told.stdout + told.stderr)
        lines = out.splitlines()
        if len(lines) > most:
            lines = [*lines[: most - 1], f"… {len(lines) - most + 1} lines more"]
        if not quiet:
            said = "\n".join(line.rstrip() for line in lines)
            shown = self.tidy(" ".join(arguments))
            self.said.append(f"```console\n$ prefixcache {shown}\n{said}\n```")
        return out

    def tidy(self, text: str) -> str:
        """Put what a reader's machine has in place of what this one has."""
        text = text.replace(self.target, "unix:/run/user/1000/prefixcache.sock")
        text = text.replace(str(self.pictures), "docs/operations")
        return re.sub(r"prefixcache-\d+-[0-9a-f]{16}", "prefixcache-1000-…", text)

    def environment(self) -> dict[str, str]:
        """Give what the commands see."""
        return os.environ | {
            "PREFIXCACHE_TARGET": self.target,
            "PREFIXCACHE_TOKENIZER": str(self.model),
            "XDG_STATE_HOME": str(self.folder),
            "COLUMNS": _COLUMNS,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        }

    @contextmanager
    def serving(self, memory: str) -> Iterator[Client]:
        """Run a service with so much memory, and end it."""
        options = ("--ghosts", _GHOSTS) if memory == _SMALL else ()
        arguments = ("serve", "--memory", memory, *options, "--model")
        process = subprocess.Popen(
            [*_COMMAND, *arguments, str(self.model), "--listen", self.target],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.environment(),
            text=True,
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line.startswith("listening at "):
                break
        said = self.tidy("\n".join(lines))
        shown = self.tidy(" ".join((*arguments, "smollm2")))
        self.say(f"```console\n$ prefixcache {shown}\n{said}\n```")
        try:
            with prefixcache.connect(self.target, timeout_s=60) as client:
                yield client
        finally:
            process.terminate()
            process.wait()

    def replay(self, requests: Sequence[dict[str, Any]]) -> None:
        """Let one real worker answer requests, one after the other."""
        if self.hollow:
            self._play_hollow(requests)
            return
        worker = subprocess.Popen(
            [*_COMMAND, "worker", "--connect", self.target, "--model", str(self.model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.environment(),
            text=True,
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        done = 0
        for line in worker.stdout:
            event = json.loads(line)
            if event["event"] not in ("ready", "finished"):
                continue
            done += event["event"] == "finished"
            print(f"\r{done} of {len(requests)} requests", end="", file=sys.stderr, flush=True)
            if done == len(requests):
                break
            worker.stdin.write(json_text(requests[done]) + "\n")
            worker.stdin.flush()
        print(file=sys.stderr)
        worker.stdin.close()
        worker.wait()

    def _play_hollow(self, requests: Sequence[dict[str, Any]]) -> None:
        """Lease and commit what a worker would, but compute nothing."""
        decoder = Decoder(self.model)
        with prefixcache.connect(self.target, timeout_s=60) as client:
            session = client.attach(self.model.name, read_layout(self.model), name="w1")
            for request in requests:
                tokens = decoder.chat(request["messages"])
                name = f"{request['id']}/0"
                with session.acquire(tokens, reserve=8, request_id=name) as lease:
                    lease.commit(len(tokens))
            session.close()


def requests(count: int, *, date_last: bool) -> list[dict[str, Any]]:
    """Give two rounds of the demo's chats, each with the date of its first question.

    In the second round every chat comes back with its second question.
    """
    first, second = [], []
    for number, chat in enumerate(chats.load().chats[:count]):
        date = _DATE.format(day=23 + number // 8, hour=9 + number % 8, minute=(7 * number) % 60)
        lines = chat.assistant.system.splitlines()
        at = len(lines) if date_last else len(lines) // 2
        system = "\n".join([*lines[:at], date, *lines[at:]])
        asked = [{"role": "system", "content": system}, {"role": "user", "content": chat.turns[0]}]
        again = [*asked, {"role": "user", "content": chat.turns[1]}]
        first.append({"id": chat.id, "messages": asked, "max_new_tokens": 4})
        second.append({"id": f"{chat.id}-again", "messages": again, "max_new_tokens": 4})
    return first + second


def main() -> None:
    """Go through all steps and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--chats", type=int, default=24)
    parser.add_argument(
        "--hollow", action="store_true", help="a worker that computes nothing; the page says so"
    )
    asked = parser.parse_args()
    pictures = asked.out / "operations"
    pictures.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="walk-"))
    try:
        session = Session(folder, smollm2.folder(), pictures, asked.hollow)
        _walk(session, asked.chats)
    finally:
        shutil.rmtree(folder)
    head = provenance()
    session.say(
        f"*Made by `make operations` at {head['time']} from commit {head['commit']}, "
        f"on {head['machine']}.*"
        + (
            " *The worker leased and committed every prompt, but computed nothing (`--hollow`): "
            "tokens and blocks are real, times of answers are not those of a model.*"
            if asked.hollow
            else ""
        )
    )
    page = asked.out / "operations.md"
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    said = "\n\n".join(session.said)
    page.write_text(f"{before}{BEGIN}\n\n{said}\n\n{END}{after}")


def _walk(session: Session, count: int) -> None:
    session.say(
        "A service with little memory, one worker, and the demo's chats: each asks once, and later "
        "once more. Every system prompt has the date and time in the middle, as many have."
    )
    asked_for = requests(count, date_last=False)
    with session.serving(_SMALL) as client:
        session.replay(asked_for)
        session.say("**Is something wrong?** `doctor` looks the service over:")
        session.show("doctor")
        session.say("**What does it look like?** One screen of `top`, and the tree:")
        session.show("top", "--once", most=34)
        session.show("top", "--svg", str(session.pictures / "top.svg"), quiet=True)
        session.say("![One screen of top](operations/top.svg)")
        session.show("tree", "--limit", "14")
        session.show("tree", "--svg", str(session.pictures / "tree.svg"), quiet=True)
        session.say("![The tree as an icicle](operations/tree.svg)")
        told = [(one["id"], client.recount(one["id"])) for one in asked_for]
        session.say("**Why was this request missed?** By its id, as it was when it came:")
        session.show("explain", max(told, key=_date_cost)[0])
        session.say("And this one? It had been there, and had to go:")
        session.show("explain", max(told, key=lambda one: one[1].ledger.evicted)[0])
        advised = _advised(session.show("doctor", quiet=True))
    if advised:
        session.say(f"**How much memory would fix it?** `doctor` said: `--memory {advised}`. So:")
        with session.serving(advised):
            session.show("stat", "--mark", "start")
            session.replay(asked_for)
            session.show("stat", "--since", "start")
    session.say(
        "**And the date?** Moved to the end of the system prompt, behind what can be shared:"
    )
    with session.serving(advised or _SMALL):
        session.show("stat", "--mark", "start", quiet=True)
        session.replay(requests(count, date_last=True))
        session.show("stat", "--since", "start")


def _date_cost(one: tuple[str, Explanation]) -> int:
    told = one[1]
    return told.num_same + told.num_parted if told.resumes_at is not None else 0


def _advised(text: str) -> str:
    """Give the memory that would have kept all that was evicted, as doctor names it."""
    found = re.findall(r"--memory (\S+?)\)?$", text, re.M)
    return found[-1].rstrip(")") if found else ""


if __name__ == "__main__":
    main()
