"""The mutants: each is one fault, and a test that notices it is told from one that does not."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from mutation import run
from mutation.mutants import Mutant, mutants
from mutation.run import Learn, is_noticed, sample

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
        "3  ->  4",
        "1  ->  2",
        "if size < LIMIT and (not by):  ->  if not (size < LIMIT and (not by)):",
        "size < LIMIT and (not by)  ->  size < LIMIT or not by",
        "size < LIMIT  ->  size <= LIMIT",
        "return max(size, pow(size, by)) + 5  ->  return None",
        "max(size, pow(size, by)) + 5  ->  max(size, pow(size, by)) - 5",
        "max(size, pow(size, by))  ->  min(size, pow(size, by))",
        "pow(size, by)  ->  pow(by, size)",
        "5  ->  6",
    ]


def test_a_function_that_asserts_is_a_test_itself_and_has_no_mutants() -> None:
    assert texts(SOURCE) == ["3  ->  4"]


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
    learnt = Learn()
    learnt.seconds = {"slow": 2.0, "quick": 1.0, "elsewhere": 0.1, "too long": 100.0}
    for name in ("slow", "quick", "too long"):
        learnt.calls[name].add(("m.py", 7))
    learnt.calls["elsewhere"].add(("m.py", 20))
    [mutant, *_] = mutants("\n" * 6 + "def f(a):\n    return a < 1\n", "m.py")
    assert mutant.function == 7
    assert run.tests_for(mutant, Path("m.py"), learnt, ["walk"]) == ["quick", "slow", "walk"]
    [constant] = mutants("LIMIT = 1\n", "m.py")
    assert run.tests_for(constant, Path("m.py"), learnt, [])[0] == "elsewhere"


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


def test_a_mutant_that_a_test_notices_is_told_from_one_that_none_does(project: Path) -> None:
    tests, path = [str(project / "test_it.py")], project / "grown_by.py"
    assert is_noticed(mutant_of(project, "a + 1  ->  a - 1"), path, tests)
    before = path.read_text()
    test = (project / "test_it.py").read_text()
    (project / "test_it.py").write_text(test.replace(" == 5", ""))
    assert not is_noticed(mutant_of(project, "a + 1  ->  a - 1"), path, tests)
    assert path.read_text() == before


def test_a_mutant_that_hangs_is_noticed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "test_it.py").write_text("def test_it():\n    while True:\n        pass\n")
    monkeypatch.setattr(run, "LIMIT_S", 3.0)
    path = project / "grown_by.py"
    assert is_noticed(mutant_of(project, "a + 1  ->  a - 1"), path, [str(project / "test_it.py")])
