"""Reuse inside blocks never costs: whatever the policy, and as the command says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prefixcache.core.policies import POLICIES
from prefixcache.types import Partial
from prefixcache_bench.experiments import tails
from prefixcache_bench.experiments.generators import Kind, Shape, generate
from prefixcache_bench.experiments.replay import Configuration, replay
from prefixcache_bench.experiments.tails import (
    TOLERANCE,
    Behind,
    Cell,
    Packing,
    Workload,
    behind,
    measure,
    misses,
)
from prefixcache_bench.experiments.traces import Trace


def reused(trace: Trace, size: int, tokens: int, policy: str, mode: Partial) -> int:
    found = replay(trace, Configuration(size, tokens // size, policy, mode))
    return found.hit_tokens + found.partial_tokens


@pytest.fixture(scope="module")
def several(small: Trace) -> list[Trace]:
    """Give traces like the small one: in one alone a block that goes earlier is some per cent."""
    shape = Shape(
        count=60, prefixes=3, prefix_tokens=70, question_tokens=9, answer_tokens=21, turns=3
    )
    return [small, *(generate(Kind.CHATS, replace(shape, seed=seed)) for seed in range(1, 6))]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("size", "tokens"), [(16, 640), (64, 1024), (64, 4096)])
def test_tails_find_no_less_than_blocks(
    several: list[Trace], policy: str, size: int, tokens: int
) -> None:
    blocks, with_tails = (
        sum(reused(trace, size, tokens, policy, mode) for trace in several)
        for mode in (Partial.BLOCKS, Partial.TAILS)
    )
    assert with_tails >= 0.998 * blocks


def test_every_cell_is_held_to_the_mode_before_it(
    small: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "BEGINNINGS", 6)
    monkeypatch.setattr(tails, "APART", 5)
    workload = Workload("small", (1, 16, 64))
    cells = measure(workload, small, 1)
    assert {cell.block_size for cell in cells} == {1, 16, 64}
    assert list(misses(cells, list(behind(workload, small, cells)))) == []
    alone = Cell("t", "lru", 1, "inf", dict.fromkeys(Partial, 100), 1000)
    short = Cell("t", "lru", 16, "inf", dict.fromkeys(Partial, 99), 1000)
    assert list(misses([alone, short], [])) == [f"{short}: 99 tokens, blocks of 1 100"]


def test_a_cell_that_is_behind_misses_if_it_is_from_other_beginnings_too(
    small: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "BEGINNINGS", 3)
    monkeypatch.setattr(tails, "APART", 2)
    reused = dict(zip(Partial, (100, 99, 90), strict=True))
    cell = Cell("small", "lru", 16, "25%", reused, 1000)
    found = list(behind(Workload("small", (1, 16)), small, [cell]))
    assert [(one.mode, one.gains[0]) for one in found] == [
        (Partial.BLOCKS, pytest.approx(-0.1)),
        (Partial.TAILS, pytest.approx(-0.9)),
    ]
    assert all(len(one.gains) == 3 for one in found)
    assert min(gain for one in found for gain in one.gains[1:]) > -TOLERANCE
    once = Behind(cell, Partial.TAILS, (-0.09, 0.1, 0.02))
    always = Behind(cell, Partial.TAILS, (-0.09, -0.1, -0.08))
    assert list(misses([cell], [once])) == []
    assert list(misses([cell], [once, always])) == [f"{always}: it costs"]
    assert "tails -0.09; from 3 beginnings -0.10 to -0.08, mean -0.090 ± 0.006" in str(always)


def test_the_tables_go_between_the_markers(small: Trace, tmp_path: Path) -> None:
    document = tmp_path / "experiments.md"
    document.write_text(f"before {tails.BEGIN}old{tails.END} after\n")
    cells = measure(Workload("small", (1, 64)), small, 1)
    one = Behind(cells[0], Partial.TAILS, (-0.09, 0.1))
    packing = Packing("small", 64, "8%", 10, 1, 100)
    tails.write(document, tails.tables([cells], [one], [], [packing]))
    text = document.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| small, `hazard`, 64 |" in text
    assert f"Behind in this replay: {one}.\nMissed: none." in text
    assert "1 of 10 tails, 1.00 % of the blocks stored" in text


def test_tails_of_one_parent_are_packed(small: Trace) -> None:
    found = tails.pack_tails(Workload("small", (64,)), small, 64, "25%")
    assert 0 <= found.saved < found.tails < found.blocks


def test_without_traces_it_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert tails.main([""]) == 2
    assert "PREFIXCACHE_TRACES" in capsys.readouterr().err
