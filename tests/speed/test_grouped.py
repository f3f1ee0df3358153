"""The benchmark of grouped attention: its tables say what they name, and both sides agree."""

from __future__ import annotations

import json

import pytest
import torch

from prefixcache_bench.speed import grouped


@pytest.mark.parametrize("kind", ["runs", "scattered"])
def test_its_tables_share_what_the_case_says(kind: str) -> None:
    case = grouped.Case("float32", kind, 8, (64, 32), 20)
    rows = grouped.tables(case, 0)
    assert {tuple(row[:4]) for row in rows} == {tuple(rows[0][:4])}
    assert len({tuple(row[:6]) for row in rows}) == grouped.LEVEL
    own = [block for row in rows for block in row[6:]]
    assert len(set(own)) == len(own) == 8 * 2
    ids = sorted({block for row in rows for block in row})
    assert ids == list(range(len(ids)))


def test_both_sides_agree_and_bytes_follow_from_the_tables() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        row = grouped.Bench(grouped.Case("float32", "scattered", 4, (64, 32), 20), 0).row(2)
    assert row.difference < 1e-5
    token = 2 * 3 * 64 * 4 / 1e6
    assert row.per_sequence_mb == pytest.approx(4 * 116 * token)
    assert row.grouped_mb == pytest.approx((64 + 4 * 32 + 4 * 20) * token)
    assert row.model == "apart"


def test_the_command_prints_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [grouped.Case("bfloat16", "runs", 2, (32,), 8)]
    monkeypatch.setattr(grouped, "cases", lambda dtypes, quick: small)
    threads = torch.get_num_threads()
    try:
        assert grouped.main(["--quick", "--rounds", "1", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert grouped.main(["--quick", "--rounds", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert [row["batch"] for row in shown["plans"]] == [8, 64]
    # A step in which nobody came or went brings its tokens, eight bytes each.
    assert [row["step_bytes"] for row in shown["plans"]] == [8 * 8, 64 * 8]
    assert "a plan for 64 sequences of 1,024 tokens" in capsys.readouterr().out
