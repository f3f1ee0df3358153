"""The cores side by side: each a process of its own, asked in turn; who is not there is told."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from prefixcache_bench.speed import core
from prefixcache_bench.speed.core import BASE, COMPILED, LENGTHS, PURE, SGLANG, Subject


def subject(name: str, *whole_us: float) -> Subject:
    """One that was measured so."""
    made = Subject.__new__(Subject)
    made.name = name
    made.rounds = {LENGTHS[1]: [[us, us / 2, us / 4, us / 4] for us in whole_us]}
    return made


def started(name: str, root: Path, python: str) -> None:
    with contextlib.closing(Subject(name, root, python, quick=True)) as one:
        one.start()


def test_a_core_is_filled_and_asked_in_a_process_of_its_own() -> None:
    ours = Subject(PURE, core.ROOT, sys.executable, quick=True)
    try:
        ours.start()
        assert ours.about.startswith("runs cache.")
        for length in (LENGTHS[1], LENGTHS[0], LENGTHS[1]):
            ours.measure(length)
    finally:
        ours.close()
    assert {length: len(told) for length, told in ours.rounds.items()} == {4000: 2, 1000: 1}
    for whole, acquire, commit, release in ours.rounds[4000]:
        assert min(acquire, commit, release) > 0
        assert whole > max(acquire, commit, release)


def test_rows_and_ratios_are_those_of_what_was_measured() -> None:
    subjects = [subject(PURE, 30, 40, 60), subject(COMPILED, 10, 16, 30), subject(BASE, 50, 50)]
    assert core.row(subjects[0], 4000, 0) == (30, 40, 60)
    lines = list(core.table(subjects))
    assert [line.split(",")[0] for line in lines[1:]] == [
        "whole job",
        "acquire",
        "commit",
        "release",
    ]
    assert "30.0 / 40.0 / 60.0" in lines[1]
    assert list(core.ratios(subjects)) == [
        "pure Python / base, 4,000 tokens: 0.80x  goal <= 0.75x MISSED  (of the minima 0.60x)",
        "compiled / base, 4,000 tokens: 0.32x  goal <= 0.5x met  (of the minima 0.20x)",
    ]


@pytest.mark.parametrize(
    ("name", "python", "reason"),
    [
        (SGLANG, "/nowhere/python", "/nowhere/python does not start: No such file"),
        (SGLANG, sys.executable, "No module named 'sglang'"),
        (PURE, sys.executable, "No module named 'prefixcache'"),
    ],
)
def test_what_cannot_be_measured_is_told_with_the_reason(
    name: str, python: str, reason: str, tmp_path: Path
) -> None:
    if name == PURE:  # a base that is none
        (tmp_path / "prefixcache.py").write_text(
            "raise ImportError(\"No module named 'prefixcache'\")"
        )
    root = tmp_path if name == PURE else core.ROOT
    with pytest.raises(core.NotMeasured, match=reason):
        started(name, root, python)


def test_nothing_compiled_gets_into_what_is_measured_as_plain_python() -> None:
    with core.sources_alone() as folders:
        for folder in folders:
            assert (folder / "prefixcache" / "core" / "cache.py").exists()
            assert not list(folder.rglob("*.so"))
    assert not folder.exists()


@pytest.mark.pure_core
def test_another_core_than_the_one_that_is_named_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(core.NotMeasured, match=rf"cache.py before what is in {tmp_path}"):
        started(BASE, tmp_path, sys.executable)
    with pytest.raises(core.NotMeasured, match="in place of what was compiled"):
        started(COMPILED, core.ROOT, sys.executable)
