"""How many small faults in the core do its tests notice?  A seeded sample, in processes of its own.

```
learn    run the examples once: which test calls which function, and for how long
for each mutant of the sample:  fork ─► its module is compiled from the changed tree
                                        the tests that call its function, the fastest first,
                                        then some of the walks; the first that fails ends it
noticed: a test fails, or the module, or time is over.   survived: all pass.
```

Nothing is written to the sources: a mutant is only ever a code object in a forked process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import hypothesis  # noqa: F401 - here, so that no fork imports it again
import numpy as np  # noqa: F401
import pytest
import sortedcontainers  # noqa: F401

from mutation.mutants import Mutant, count, mutants

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "prefixcache" / "core"
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
MOST_SECONDS_OF_EXAMPLES = 15.0
NUM_WALKS = 12
LIMIT_S = 180.0
"""Guards against a mutant that hangs: all the tests of one take a tenth."""
MOST_MEMORY = 6 << 30


class Learn:
    """A plugin of pytest: which functions of the core each test calls, and its seconds."""

    def __init__(self) -> None:
        self.calls: dict[str, set[tuple[str, int]]] = defaultdict(set)
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        called = self.calls[item.nodeid]
        known: set[CodeType] = set()

        def note(frame: FrameType, event: str, _: object) -> None:
            code = frame.f_code
            if event == "call" and code not in known:
                known.add(code)
                if code.co_filename.startswith(str(CORE)):
                    called.add((code.co_filename, code.co_firstlineno))

        began = time.process_time()
        sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(None)
            self.seconds[item.nodeid] = time.process_time() - began


class Collect:
    """A plugin of pytest: the names of all tests."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.names = [item.nodeid for item in items]


class Choice(NamedTuple):
    """One mutant of the sample."""

    path: Path
    number: int


def learn(tests: list[str]) -> Learn:
    """Run the examples, and see what they call."""
    plugin = Learn()
    options = [one for one in OPTIONS if one != "-x"]
    code = pytest.main([*options, "-m", "not slow", *tests], plugins=[plugin])
    if code:
        raise SystemExit("the tests fail without a mutant; nothing can be said")
    return plugin


def walks(tests: list[str], seed: int) -> list[str]:
    """Choose some of the slow tests."""
    found = Collect()
    pytest.main([*OPTIONS, "--collect-only", "-m", "slow", *tests], plugins=[found])
    return random.Random(seed).sample(found.names, min(NUM_WALKS, len(found.names)))


def tests_for(mutant: Mutant, path: Path, learnt: Learn, slow: list[str]) -> list[str]:
    """Give the tests that may notice a mutant, the fastest first, then the slow ones."""
    chosen, left = [], MOST_SECONDS_OF_EXAMPLES
    for name in sorted(learnt.seconds, key=learnt.seconds.__getitem__):
        calls = learnt.calls[name]
        key = (str(path), mutant.function)
        if key in calls if mutant.function else any(file == str(path) for file, _ in calls):
            left -= learnt.seconds[name]
            if left < 0:
                break
            chosen.append(name)
    return chosen + slow


def is_noticed(mutant: Mutant, path: Path, tests: list[str]) -> bool:
    """Run tests against a mutant, in a process of its own."""
    child = os.fork()
    if not child:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        _put(mutant.code, path)
        code = 1
        try:
            code = pytest.main([*OPTIONS, *tests])
        finally:
            os._exit(int(code))
    return _ended(child) != 0


def _put(code: CodeType, path: Path) -> None:
    """Have the module at `path` made of that code, in this process, when it is imported."""
    original = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, name: str) -> Any:
        return code if loader.path == str(path) else original(loader, name)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


def _ended(child: int) -> int:
    """Wait for a process; one that does not end is killed, and has failed."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def sample(paths: list[Path], per_file: int, seed: int) -> list[Choice]:
    """Choose so many mutants of each file; of a small one, all."""
    found = []
    for path in paths:
        total = count(path.read_text())
        draw = random.Random(f"{seed} {path.name}")
        numbers = draw.sample(range(total), min(per_file, total))
        found += [Choice(path, number) for number in sorted(numbers)]
    random.Random(seed).shuffle(found)
    return found


def main() -> None:
    """Parse the command line; run; print what survived, and the score."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--per-file", type=int, default=20, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("files", nargs="*", help="files of the core, e.g. quota.py; default: all")
    options = parser.parse_args()
    every = sorted(path for path in CORE.rglob("*.py") if path.name != "__init__.py")
    paths = [one for one in every if not options.files or one.name in options.files]
    chosen = sample(paths, options.per_file, options.seed)
    os.chdir(ROOT)
    plan = _plan(options.seed)
    _control(chosen[0].path, plan)
    shares = [chosen[number :: options.processes] for number in range(options.processes)]
    children = []
    for share in shares:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            _work(share, plan, write)
            os._exit(0)
        os.close(write)
        children.append((child, os.fdopen(read)))
    survived = []
    for child, lines in children:
        survived += [line.rstrip("\n") for line in lines]
        if os.waitpid(child, 0)[1]:
            raise SystemExit("a process that ran mutants has failed")
    sys.stdout.write("".join(f"{line}\n" for line in sorted(survived)))
    noticed = len(chosen) - len(survived)
    share = 100 * noticed / len(chosen)
    sys.stdout.write(f"{noticed} of {len(chosen)} mutants noticed: {share:.1f} %\n")


def _plan(seed: int) -> tuple[Learn, list[str]]:
    """Learn in a process of its own: this one never imports the core, so each fork does."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        learnt = learn(["tests/core"])
        told = {
            "seconds": learnt.seconds,
            "calls": {name: sorted(calls) for name, calls in learnt.calls.items()},
            "walks": walks(["tests/core"], seed),
        }
        with os.fdopen(write, "w") as file:
            json.dump(told, file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    if os.waitpid(child, 0)[1] or not text:
        raise SystemExit("the tests of the core fail without a mutant: nothing can be said")
    told = json.loads(text)
    learnt = Learn()
    learnt.seconds = told["seconds"]
    for name, calls in told["calls"].items():
        learnt.calls[name] = {(file, line) for file, line in calls}
    return learnt, told["walks"]


def _control(path: Path, plan: tuple[Learn, list[str]]) -> None:
    """See that a mutant without a fault is not noticed: what is noticed are faults alone."""
    same = Mutant(1, 0, "nothing", compile(path.read_text(), str(path), "exec"))
    if is_noticed(same, path, tests_for(same, path, *plan)):
        raise SystemExit(f"the tests fail with {path.name} as it is: nothing can be said")


def _work(share: list[Choice], plan: tuple[Learn, list[str]], write: int) -> None:
    """Run mutants one by one; write a line for each that survives."""
    with os.fdopen(write, "w", buffering=1) as survived:
        for path, number in share:
            mutant = next(mutants(path.read_text(), str(path), number))
            if not is_noticed(mutant, path, tests_for(mutant, path, *plan)):
                line = f"{path.relative_to(CORE)}:{mutant.line}: {mutant.what}"
                survived.write(f"{line}\n")
                sys.stderr.write(f"survived: {line}\n")


if __name__ == "__main__":
    main()
