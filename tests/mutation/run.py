"""How many small faults in the core do its tests notice?  A seeded sample, each in a process.

```
learn    run the examples and some of the walks once: which test calls which function, how long
for each mutant of the sample:  fork ─► its function gets the code of the changed tree
                                        the tests that call the function, the fastest first;
                                        the first that fails ends it
noticed: a test fails, or the process, or a test takes many times as long.   survived: all pass.
```

The process that forks has imported and collected all, so a mutant costs no more than its tests.
One that is in no function, or in a default, has its module made anew, in a process that had not
imported it.  Nothing is written to the sources: a mutant is only ever a code object in a forked
process.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import hypothesis  # noqa: F401 - here, so that no fork imports it again
import numpy as np  # noqa: F401
import pytest
import sortedcontainers  # noqa: F401

from mutation.equivalent import EQUIVALENT
from mutation.mutants import Mutant, count, mutants
from prefixcache import core_build

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "prefixcache" / "core"
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
MOST_SECONDS_OF_EXAMPLES, MOST_SECONDS_OF_WALKS = 20.0, 6.0
WALKS = "test_machine.py"
NUM_WALKS = 12
MOST_CALLS = 300_000
"""Of one test, looked at to learn what it calls; more would take longer than all tests do."""
LIMIT_S = 600.0
MOST_TIMES_AS_LONG = 10
"""These two guard against a mutant that hangs: the second in seconds of the processor."""
MOST_MEMORY = 6 << 30
_PR_SET_PDEATHSIG = 1
EVERY = 10
"""Mutants between two lines of progress."""


class Choice(NamedTuple):
    """One mutant of the sample."""

    path: Path
    number: int

    def make(self) -> Mutant:
        """Make it.  O(its module)."""
        return next(mutants(self.path.read_text(), str(self.path), self.number))


class Learnt:
    """Which functions of the core each test calls, and its seconds of the processor."""

    def __init__(self) -> None:
        self.calls: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self.seconds: dict[str, float] = {}

    def tests_for(self, mutant: Mutant, path: Path) -> list[str]:
        """Give the tests that may notice a mutant, the fastest first, then walks.

        Of one in no function: those that call any function of its module, or are of its name.
        """
        chosen: list[str] = []
        key, of_its_name = (str(path), mutant.function), f"/test_{path.name}::"
        kinds = ((False, MOST_SECONDS_OF_EXAMPLES), (True, MOST_SECONDS_OF_WALKS))
        for are_walks, left in kinds:
            for name in sorted(self.seconds, key=self.seconds.__getitem__):
                calls = self.calls[name]
                is_called = (
                    key in calls
                    if mutant.function
                    else of_its_name in name or any(file == str(path) for file, _ in calls)
                )
                if is_called and (WALKS in name) == are_walks:
                    left -= self.seconds[name]
                    if left < 0:
                        break
                    chosen.append(name)
        return chosen

    def run(self, item: pytest.Item, following: pytest.Item | None) -> None:
        """Run a test, and see what it calls."""
        called = self.calls[item.nodeid]
        known: set[CodeType] = set()
        left = MOST_CALLS

        def note(frame: FrameType, _event: str, _arg: object) -> None:
            nonlocal left
            left -= 1
            if not left:
                sys.settrace(None)
            code = frame.f_code
            if code not in known:
                known.add(code)
                if code.co_filename.startswith(f"{CORE}{os.sep}"):
                    called.add((code.co_filename, code.co_qualname.partition(".<locals>")[0]))

        began = time.process_time()
        sys.settrace(note)  # of calls alone; tests that count calls set a profile of their own
        try:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        finally:
            sys.settrace(None)
        self.seconds[item.nodeid] = time.process_time() - began

    def write(self, path: Path) -> None:
        """Keep it, and of which tree and code it is."""
        calls = {name: sorted(called) for name, called in self.calls.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"of": digest(), "seconds": self.seconds, "calls": calls}))

    @classmethod
    def read(cls, path: Path) -> Learnt:
        """Read what was kept.

        Raises:
            ValueError: it is none, or was learnt of another tree or of other code.
        """
        learnt, told = cls(), json.loads(path.read_text())
        if not isinstance(told, dict) or told.get("of") != digest():
            raise ValueError(
                f"{path} was not learnt of this code in {ROOT}; remove it, or name another file"
            )
        learnt.seconds = told["seconds"]
        for name, calls in told["calls"].items():
            learnt.calls[name] = {(file, function) for file, function in calls}
        return learnt


def digest() -> str:
    """Tell this tree, its package and the tests of the core from any other.  O(their bytes)."""
    told = hashlib.sha256()
    for folder in (ROOT / "prefixcache", ROOT / "tests" / "core"):
        for path in sorted(folder.rglob("*.py")):
            told.update(f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return told.hexdigest()


class Loop:
    """A plugin of pytest: in place of its loop over the tests, one of ours, all collected."""

    def __init__(self, body: Callable[[pytest.Session], None]) -> None:
        self._body = body

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run ours."""
        self._body(session)
        return True


def learn(session: pytest.Session, plan: Path, seed: int) -> None:
    """Run, in a process of its own, the tests that the plan does not know."""
    examples = [item for item in session.items if not item.get_closest_marker("slow")]
    walks = [item for item in session.items if item.path.name == WALKS]
    walks = random.Random(seed).sample(walks, min(NUM_WALKS, len(walks)))
    old = Learnt.read(plan) if plan.exists() else Learnt()
    chosen = [item for item in examples + walks if item.nodeid not in old.seconds]
    child = fork()
    if not child:
        for item, following in zip(chosen, [*chosen[1:], None], strict=True):
            old.run(item, following)
        if not session.testsfailed:
            old.write(plan)
        os._exit(min(session.testsfailed, 1))
    if os.waitpid(child, 0)[1]:
        sys.stderr.write("the tests of the core fail without a mutant: nothing can be said\n")
        os._exit(1)


def fork() -> int:
    """Fork; the child ends when this process does, however that ends."""
    parent = os.getpid()
    child = os.fork()
    if not child and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    return child


def functions(code: CodeType) -> Iterator[CodeType]:
    """Give the code of each function of a module and of its classes, in order."""
    for one in code.co_consts:
        if isinstance(one, CodeType):
            if one.co_flags & CO_OPTIMIZED:
                yield one
            else:
                yield from functions(one)


def living_functions(folder: Path) -> list[FunctionType]:
    """Find each function that was made from the modules in a folder, wherever it is kept."""
    return [
        one
        for one in gc.get_objects()
        if type(one) is FunctionType  # isinstance would ask lazy objects of torch for their class
        and one.__code__.co_filename.startswith(str(folder))
    ]


def put_into_living(living: list[FunctionType], original: CodeType, changed: CodeType) -> bool:
    """Give a living function the code that it has in a changed module.

    False, and nothing is changed, if the fault is elsewhere.
    """
    befores, afters = list(functions(original)), list(functions(changed))
    if len(befores) != len(afters):
        return False
    pairs = [pair for pair in zip(befores, afters, strict=True) if pair[0] != pair[1]]
    if len(pairs) != 1:
        return False
    before, after = pairs[0]
    found = [one for one in living if one.__code__ == before]
    if not found or before.co_freevars != after.co_freevars:
        return False
    for one in found:
        one.__code__ = after
    return True


def _run_tests(session: pytest.Session, names: list[str], learnt: Learnt) -> None:
    """Run tests until one fails, in a forked process, which this ends."""
    there = {item.nodeid: item for item in session.items}
    items = [there[name] for name in names if name in there]
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    for item, following in zip(items, [*items[1:], None], strict=True):
        limit = time.process_time() + 3 + MOST_TIMES_AS_LONG * learnt.seconds[item.nodeid]
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), resource.RLIM_INFINITY))
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            os._exit(1)
    os._exit(0)


def _in_fork(
    session: pytest.Session,
    mutant: Mutant,
    path: Path,
    learnt: Learnt,
    living: list[FunctionType],
) -> bool | None:
    """Say whether a mutant is noticed; None: only a process that has not imported it can tell."""
    tests = learnt.tests_for(mutant, path)
    child = fork()
    if not child:
        code = 2
        try:
            os.setsid()
            if put_into_living(living, compile(path.read_text(), str(path), "exec"), mutant.code):
                code = 1
                _run_tests(session, tests, learnt)
        finally:
            os._exit(code)
    code = _ended(child)
    return None if code == 2 else code != 0


def is_noticed(mutant: Mutant, path: Path, tests: list[str]) -> bool:
    """Run tests against a mutant whose module is imported anew, in a process of its own."""
    if not tests:
        return False  # pytest without names would run all tests there are
    child = fork()
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
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what its tests have left
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
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


class Result(NamedTuple):
    """What became of one mutant."""

    file: str
    line: int
    name: str
    state: str
    """`noticed`, `survived` or `equivalent`."""

    @property
    def text(self) -> str:
        """Say it in a line."""
        return f"{self.file}:{self.line}: {self.name}"


def _result(path: Path, mutant: Mutant, state: str) -> Result:
    return Result(str(path.relative_to(CORE)), mutant.line, mutant.name, state)


def table(results: list[Result]) -> str:
    """Write what survived, and the score of each file and of all."""
    lines = [f"survived  {one.text}" for one in sorted(results) if one.state == "survived"]
    lines += ["", f"{'file':26}{'mutants':>9}{'equivalent':>12}{'noticed':>9}{'share':>9}"]
    files = sorted({one.file for one in results})
    for name in [*files, "all"]:
        states = [one.state for one in results if name in (one.file, "all")]
        noticed, faults = states.count("noticed"), len(states) - states.count("equivalent")
        share = f"{100 * noticed / faults:.1f} %" if faults else "-"
        lines.append(f"{name:26}{len(states):>9}{len(states) - faults:>12}{noticed:>9}{share:>9}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line; run; print what survived, and the score."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--per-file", type=int, default=10, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plan", type=Path, help="keep here, and take from here, what was learnt")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("files", nargs="*", help="files of the core, e.g. quota.py; default: all")
    options = parser.parse_args()
    if core_build.kind() != core_build.PURE:
        parser.error("the core is compiled: no mutant would run; `make pure` first")
    if options.plan and options.plan.exists():
        try:
            Learnt.read(options.plan)
        except ValueError as wrong:
            parser.error(str(wrong))
    every = sorted(path for path in CORE.rglob("*.py") if path.name != "__init__.py")
    paths = [one for one in every if not options.files or one.name in options.files]
    chosen = sample(paths, options.per_file, options.seed)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        plan = options.plan or Path(folder, "plan.json")
        results = _results(chosen, plan, options.seed)
    sys.stdout.write(table(results))
    if options.json:
        rows = [one._asdict() for one in results]
        told = {"seed": options.seed, "per_file": options.per_file, "mutants": rows}
        options.json.write_text(json.dumps(told, indent=1))


def _results(chosen: list[Choice], plan: Path, seed: int) -> list[Result]:
    """Run all mutants; tell of progress, and of each that survives, on standard error."""
    results, left = [], []
    for choice in chosen:
        mutant = choice.make()
        if f"{choice.path.relative_to(CORE)}: {mutant.name}" in EQUIVALENT:
            results.append(_result(choice.path, mutant, "equivalent"))
        else:
            left.append((choice.path, mutant))
    began = time.monotonic()

    def note(path: Path, mutant: Mutant, noticed: bool) -> None:
        result = _result(path, mutant, "noticed" if noticed else "survived")
        results.append(result)
        if not noticed:
            sys.stderr.write(f"survived  {result.text}\n")
        if len(results) % EVERY == 0:
            survived = sum(one.state == "survived" for one in results)
            took = f"{time.monotonic() - began:.0f} s"
            sys.stderr.write(f"{len(results)} of {len(chosen)}, {survived} survived, {took}\n")

    anew = []
    for number, noticed in _server(left, plan, seed):
        if noticed is None:
            anew.append(left[number])
        else:
            note(*left[number], noticed)
    learnt = Learnt.read(plan)
    if anew:
        _control(anew[0][0], learnt)
    for path, mutant in anew:
        note(path, mutant, is_noticed(mutant, path, learnt.tests_for(mutant, path)))
    return results


def _server(
    left: list[tuple[Path, Mutant]], plan: Path, seed: int
) -> Iterator[tuple[int, bool | None]]:
    """Give what becomes of each mutant, from a process that imports and collects all once."""
    read, write = os.pipe()
    child = fork()
    if not child:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

        def body(session: pytest.Session) -> None:
            learn(session, plan, seed)
            learnt = Learnt.read(plan)
            took = f"{sum(learnt.seconds.values()):.0f} s of the processor"
            sys.stderr.write(f"{len(learnt.seconds)} tests pass, in {took}\n")
            living = living_functions(CORE)
            with os.fdopen(write, "w", buffering=1) as told:
                for number, (path, mutant) in enumerate(left):
                    noticed = _in_fork(session, mutant, path, learnt, living)
                    told.write(json.dumps([number, noticed]) + "\n")
            os._exit(0)

        pytest.main([*OPTIONS, "tests/core"], plugins=[Loop(body)])
        os._exit(1)
    os.close(write)
    with os.fdopen(read) as lines:
        for line in lines:
            number, noticed = json.loads(line)
            yield number, noticed
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the process that runs the mutants has failed")


def _control(path: Path, learnt: Learnt) -> None:
    """See that a mutant without a fault is not noticed: what is noticed are faults alone."""
    same = Mutant(1, "", "nothing", compile(path.read_text(), str(path), "exec"))
    if is_noticed(same, path, learnt.tests_for(same, path)):
        raise SystemExit(f"the tests fail with {path.name} as it is: nothing can be said")


if __name__ == "__main__":
    main()
