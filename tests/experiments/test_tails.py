"""Reuse inside blocks never costs: whatever the policy, and as the command says."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixcache.core.policies import POLICIES
from prefixcache.types import Partial
from prefixcache_bench.experiments import tails
from prefixcache_bench.experiments.replay import Configuration, replay
from prefixcache_bench.experiments.tails import Cell, Packing, Workload, measure, misses
from prefixcache_bench.experiments.traces import Trace


def reused(trace: Trace, size: int, tokens: int, policy: str, mode: Partial) -> int:
    found = replay(trace, Configuration(size, tokens // size, policy, mode))
    return found.hit_tokens + found.partial_tokens


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("size", "tokens"), [(16, 640), (16, 2048), (64, 1024), (64, 4096)])
def test_tails_find_no_less_than_blocks(small: Trace, policy: str, size: int, tokens: int) -> None:
    blocks = reused(small, size, tokens, policy, Partial.BLOCKS)
    # On a trace as short as this, one block that goes earlier is some tenths of a per cent.
    assert reused(small, size, tokens, policy, Partial.TAILS) >= 0.99 * blocks


def test_every_cell_is_held_to_the_mode_before_it(small: Trace) -> None:
    cells = measure(Workload("small", (1, 16, 64)), small, 1)
    assert {cell.block_size for cell in cells} == {1, 16, 64}
    # On a trace as short as this, a single block is more than the tolerance.
    assert min(min(cell.blocks_gain, cell.tails_gain) for cell in cells) > -0.15
    worse = Cell("t", "lru", 16, "1%", dict(zip(Partial, (100, 99, 90), strict=True)), 1000)
    assert [one.rpartition(": ")[2] for one in misses([worse])] == ["blocks cost", "tails cost"]
    alone = Cell("t", "lru", 1, "inf", dict.fromkeys(Partial, 100), 1000)
    short = Cell("t", "lru", 16, "inf", dict.fromkeys(Partial, 99), 1000)
    assert list(misses([alone, short])) == [f"{short}: 99 tokens, blocks of 1 100"]


def test_the_tables_go_between_the_markers(small: Trace, tmp_path: Path) -> None:
    document = tmp_path / "experiments.md"
    document.write_text(f"before {tails.BEGIN}old{tails.END} after\n")
    cells = measure(Workload("small", (1, 64)), small, 1)
    tails.write(document, [cells], [Packing("small", 64, "8%", 10, 1, 100)])
    text = document.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| small, `hazard`, 64 |" in text
    assert "1 of 10 tails, 1.00 % of the blocks stored" in text


def test_tails_of_one_parent_are_packed(small: Trace) -> None:
    found = tails.pack_tails(Workload("small", (64,)), small, 64, "25%")
    assert 0 <= found.saved < found.tails < found.blocks


def test_without_traces_it_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert tails.main([""]) == 2
    assert "PREFIXCACHE_TRACES" in capsys.readouterr().err
