"""The mutants: each is one fault, and a test that notices it is told from one that does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest

from core.effort import calls
from mutation import run
from mutation.equivalent import EQUIVALENT
from mutation.mutants import Mutant, mutants
from mutation.run import (
    Learnt,
    Result,
    is_noticed,
    living_functions,
    put_into_living,
    sample,
    table,
)
from prefixcache.core.account import Account, Sums

SOURCE = dedent('''
    """Not 1 of these + words changes."""

    LIMIT: int = 3


    def grown(size: int, by: int = 1) -> int:
        assert size < 10, "not changed"
        if size < LIMIT and not by:
            raise ValueError(f"{size + 1} is not changed")
        return max(size, pow(size, by)) + 5
''')


def texts(source: str) -> list[str]:
    return [one.what for one in mutants(source, "m.py")]


def test_each_kind_of_fault_is_made_once_and_messages_asserts_and_annotations_are_left_alone():
    source = SOURCE.replace('    assert size < 10, "not changed"\n', "")
    assert texts(source) == [
        "LIMIT: int = 3  ->  LIMIT: int = 4",
        "def grown(size: int, by: int=1) -> int:  ->  def grown(size: int, by: int=2) -> int:",
        "if size < LIMIT and (not by):  ->  if not (size < LIMIT and (not by)):",
        "size < LIMIT and (not by)  ->  size < LIMIT or not by",
        "size < LIMIT  ->  size <= LIMIT",
        "return max(size, pow(size, by)) + 5  ->  return None",
        "max(size, pow(size, by)) + 5  ->  max(size, pow(size, by)) - 5",
        "max(size, pow(size, by))  ->  min(size, pow(size, by))",
        "pow(size, by)  ->  pow(by, size)",
        "return max(size, pow(size, by)) + 5  ->  return max(size, pow(size, by)) + 6",
    ]


def test_a_function_that_asserts_is_a_test_itself_and_has_no_mutants() -> None:
    assert texts(SOURCE) == ["LIMIT: int = 3  ->  LIMIT: int = 4"]


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def __repr__(self):\n        return str(1 + self.x)\n",
        "class A:\n    __slots__ = ('a', 1)\n",
        "__all__ = ['a' + 'b']\n",
        "@dataclass(slots=True, frozen=True)\nclass A:\n    a: int\n",
        "for one in zip(a, strict=True):\n    pass\n",
        "del a\n",
    ],
)
def test_what_no_behaviour_follows_from_has_no_mutants(source: str) -> None:
    assert texts(source) == []


def test_when_to_tidy_up_may_be_one_later_but_not_never() -> None:
    source = dedent("""
        def f(self):
            self._tidy_at = 64
            if self.size > self._tidy_at:
                self.tidy(1)
                self._tidy_at = max(64, 2 * self.size)
    """)
    assert texts(source) == [
        "self._tidy_at = 64  ->  removed",
        "self.tidy(1)  ->  removed",
        "self.tidy(1)  ->  self.tidy(2)",
        "self._tidy_at = max(64, 2 * self.size)  ->  removed",
        "max(64, 2 * self.size)  ->  min(64, 2 * self.size)",
        "2 * self.size  ->  2 // self.size",
    ]


def test_a_mutant_is_known_by_its_function_wherever_that_stands() -> None:
    source = (
        "class A:\n    def f(self):\n        def g():\n            return 3\n        return g\n"
    )
    names = [one.name for one in mutants(source, "m.py")]
    assert names == [one.name for one in mutants("\n\n" + source, "m.py")]
    assert names == [
        "A.f: return 3  ->  return None",
        "A.f: return 3  ->  return 4",
        "A.f: return g  ->  return None",
    ]
    [constant] = mutants("class A:\n    LIMIT = 3\n", "m.py")
    assert constant.name == ": LIMIT = 3  ->  LIMIT = 4"


def test_every_mutant_that_is_called_no_fault_says_where_it_is_and_why() -> None:
    for name, reason in EQUIVALENT.items():
        assert (run.CORE / name.partition(": ")[0]).is_file()
        assert "  ->  " in name
        assert len(reason) > 10


def test_a_mutant_has_its_one_fault_and_the_next_one_has_it_no_more() -> None:
    values = []
    for mutant in mutants("a = 1\nb = 2\n", "m.py"):
        there: dict[str, Any] = {}
        exec(mutant.code, there)  # noqa: S102 - two assignments
        values.append((mutant.line, there["a"], there["b"]))
    assert values == [(1, 2, 2), (2, 1, 3)]


def test_statements_are_removed_whose_names_nobody_needs() -> None:
    source = "def f(a):\n    a.x = g()\n    y = h()\n    a.call()\n    return\n"
    assert texts(source) == ["a.x = g()  ->  removed", "a.call()  ->  removed"]


def test_a_seed_draws_the_same_mutants_again_and_no_more_than_there_are(tmp_path: Path) -> None:
    (file := tmp_path / "m.py").write_text(
        SOURCE.replace('    assert size < 10, "not changed"\n', "")
    )
    assert sample([file], 3, seed=1) == sample([file], 3, seed=1)
    assert len(sample([file], 3, seed=1)) == 3
    assert len(sample([file], 1000, seed=1)) == len(texts(file.read_text()))


def test_those_tests_are_run_that_call_the_function_the_fastest_first() -> None:
    learnt = Learnt()
    learnt.seconds = {"slow": 2.0, "quick": 1.0, "elsewhere": 0.1, "too long": 100.0}
    for name in ("slow", "quick", "too long"):
        learnt.calls[name].add(("m.py", "f"))
    learnt.calls["elsewhere"].add(("m.py", "g"))
    [mutant, *_] = mutants("\n" * 6 + "def f(a):\n    return a < 1\n", "m.py")
    assert mutant.function == "f"
    assert learnt.tests_for(mutant, Path("m.py")) == ["quick", "slow"]
    [constant] = mutants("LIMIT = 1\n", "m.py")
    assert learnt.tests_for(constant, Path("m.py"))[0] == "elsewhere"


def test_a_constant_that_no_function_reads_is_tried_by_the_tests_of_its_file_or_by_none() -> None:
    learnt = Learnt()
    learnt.seconds = {"tests/core/test_m.py::test_it": 1.0, "tests/core/test_mm.py::test_it": 1.0}
    [constant] = mutants("LIMIT = 1\n", "m.py")
    assert learnt.tests_for(constant, Path("m.py")) == ["tests/core/test_m.py::test_it"]
    assert learnt.tests_for(constant, Path("n.py")) == []
    assert not is_noticed(constant, Path("n.py"), [])


def test_what_a_test_calls_is_learnt_also_of_one_that_counts_calls() -> None:
    def protocol(item: pytest.Item, nextitem: pytest.Item | None) -> None:
        calls(Sums)
        Account("t", None)

    hook = SimpleNamespace(pytest_runtest_protocol=protocol)
    item: Any = SimpleNamespace(nodeid="it", config=SimpleNamespace(hook=hook))
    learnt = Learnt()
    learnt.run(item, None)
    assert {name for _, name in learnt.calls["it"]} == {"Sums.__init__", "Account.__init__"}


def test_what_was_learnt_is_read_back(tmp_path: Path) -> None:
    learnt = Learnt()
    learnt.seconds["a"] = 0.5
    learnt.calls["a"].add(("m.py", "f"))
    learnt.write(tmp_path / "plan.json")
    again = Learnt.read(tmp_path / "plan.json")
    assert (again.seconds, again.calls) == (learnt.seconds, learnt.calls)


@pytest.mark.parametrize("of", ["another tree", "other code", "no plan"])
def test_what_was_learnt_of_another_tree_or_of_other_code_is_refused(
    of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    for name in ("prefixcache", "tests/core"):
        (tmp_path / "a" / name).mkdir(parents=True)
        (tmp_path / "b" / name).mkdir(parents=True)
        for tree in "ab":
            (tmp_path / tree / name / "m.py").write_text("a = 1\n")
    monkeypatch.setattr(run, "ROOT", tmp_path / "a")
    Learnt().write(plan)
    Learnt.read(plan)
    if of == "another tree":
        monkeypatch.setattr(run, "ROOT", tmp_path / "b")
    elif of == "other code":
        (tmp_path / "a" / "tests" / "core" / "m.py").write_text("a = 2\n")
    else:
        plan.write_text("[]")
    before = plan.read_text()
    monkeypatch.setattr(sys, "argv", ["mutants", "--plan", str(plan)])
    with pytest.raises(SystemExit):
        run.main()
    assert "remove it, or name another file" in capsys.readouterr().err
    assert plan.read_text() == before


def test_a_living_function_gets_the_changed_code_and_a_default_is_left_to_a_new_process() -> None:
    source = dedent("""
        class A:
            def f(self, by=1):
                return super().__sizeof__() * 0 + self.two() + by

            def two(self):
                return 2
    """)
    there: dict[str, Any] = {}
    original = compile(source, "/nowhere/m.py", "exec")
    exec(original, there)  # noqa: S102 - the class above
    kept = there["A"]()
    living = living_functions(Path("/nowhere"))
    assert {one.__name__ for one in living} == {"f", "two"}
    found = {one.what: one.code for one in mutants(source, "/nowhere/m.py")}
    default = found["def f(self, by=1):  ->  def f(self, by=2):"]
    assert not put_into_living(living, original, default)
    assert kept.f() == 3
    assert put_into_living(living, original, found["return 2  ->  return 3"])
    assert kept.f() == 4


def test_the_table_leaves_what_is_no_fault_out_of_the_share() -> None:
    states = ["noticed", "noticed", "noticed", "survived", "equivalent"]
    results = [Result("a.py", line, "f: x", state) for line, state in enumerate(states)]
    told = table([*results, Result("b.py", 1, "g: y", "noticed")]).split("\n")
    assert told[0] == "survived  a.py:3: f: x"
    assert [line.split() for line in told[3:6]] == [
        ["a.py", "5", "1", "3", "75.0", "%"],
        ["b.py", "1", "0", "1", "100.0", "%"],
        ["all", "6", "1", "4", "80.0", "%"],
    ]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of one function, and a test of it."""
    (tmp_path / "grown_by.py").write_text("def f(a):\n    return a + 1\n")
    (tmp_path / "test_it.py").write_text(
        "import sys\n\n"
        "def test_it():\n"
        "    sys.path.insert(0, __file__.rpartition('/')[0])\n"
        "    import grown_by\n"
        "    assert grown_by.f(4) == 5\n"
    )
    monkeypatch.setattr(run, "OPTIONS", [*run.OPTIONS, "--rootdir", str(tmp_path)])
    return tmp_path


def mutant_of(project: Path, what: str) -> Mutant:
    path = project / "grown_by.py"
    [found] = [one for one in mutants(path.read_text(), str(path)) if one.what == what]
    return found


@pytest.mark.slow
def test_a_mutant_that_a_test_notices_is_told_from_one_that_none_does(project: Path) -> None:
    tests, path = [str(project / "test_it.py")], project / "grown_by.py"
    assert is_noticed(mutant_of(project, "a + 1  ->  a - 1"), path, tests)
    before = path.read_text()
    test = (project / "test_it.py").read_text()
    (project / "test_it.py").write_text(test.replace(" == 5", ""))
    assert not is_noticed(mutant_of(project, "a + 1  ->  a - 1"), path, tests)
    assert path.read_text() == before


@pytest.mark.slow
def test_a_mutant_that_hangs_is_noticed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "test_it.py").write_text("def test_it():\n    while True:\n        pass\n")
    monkeypatch.setattr(run, "LIMIT_S", 3.0)
    path = project / "grown_by.py"
    assert is_noticed(mutant_of(project, "a + 1  ->  a - 1"), path, [str(project / "test_it.py")])


def test_who_is_killed_leaves_no_process_behind() -> None:
    """Each of them holds the end of one pipe: it is at its end when the last one has gone."""
    program = dedent("""
        import os, time
        from mutation.run import fork
        if not fork():
            if not fork():
                os.setsid()
                print("there", flush=True)
            time.sleep(600)
        time.sleep(600)
    """)
    path = os.pathsep.join([str(run.ROOT), str(run.ROOT / "tests")])
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as runner:
        assert runner.stdout is not None
        assert runner.stdout.readline() == b"there\n"
        runner.kill()
        assert runner.stdout.read() == b""
