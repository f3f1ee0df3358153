from __future__ import annotations

from pathlib import Path

import pytest

from prefixcache.errors import InvalidRequest
from prefixcache.types import Partial
from prefixcache_bench.experiments.capacity import parse_capacities, parse_capacity
from prefixcache_bench.experiments.replay import Configuration, replay
from prefixcache_bench.experiments.rows import COLUMNS, Row, RowFile, key_of, row_of
from prefixcache_bench.experiments.sweep import Grid, ceilings, sweep
from prefixcache_bench.experiments.traces import Trace

GRID = Grid(
    (1, 8, 32),
    tuple(parse_capacities("2k,25%,75%,40b,64k,inf")),
    ("lru", "fifo"),
    tuple(Partial),
)


def without_time(row: Row) -> Row:
    return {name: row[name] for name in COLUMNS if name not in {"cpu_s", "same_as_infinite"}}


@pytest.mark.slow
def test_every_row_of_a_sweep_equals_a_replay_of_its_own(small: Trace) -> None:
    working_set = ceilings(small, GRID.block_sizes).working_set
    rows: list[Row] = []
    sweep(small, GRID, working_set, [], rows.append, processes=2)
    assert sorted(map(key_of, rows)) == sorted(GRID.combinations())
    assert {row["same_as_infinite"] for row in rows} == {0, 1}
    for row in rows:
        blocks = parse_capacity(row["capacity"]).blocks(row["block_size"], working_set)
        asked = Configuration(row["block_size"], blocks, row["policy"], Partial(row["partial"]))
        alone = row_of(replay(small, asked), row["capacity"])
        assert without_time(row) == without_time(alone)


def test_both_ceilings_are_those_of_infinite_memory(small: Trace) -> None:
    limits = ceilings(small, (8, 32))
    assert limits.working_set == replay(small, Configuration(1)).peak_blocks
    assert limits.finest == replay(small, Configuration(1)).hit_rate
    assert limits.by_block_size[32] == replay(small, Configuration(32)).hit_rate


def test_a_stopped_sweep_keeps_its_rows_and_goes_on_from_there(
    small: Trace, tmp_path: Path
) -> None:
    path, head = tmp_path / "out" / "s.csv", {"trace": small.name, "fingerprint": "abc"}
    grid = Grid((8,), tuple(parse_capacities("1k,2k,inf")), ("lru",), (Partial.OFF,))
    file = RowFile(path, head)

    def stop_after_two(row: Row) -> None:
        file.add(row)
        if len(file.rows) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(small, grid, 0, [], stop_after_two, processes=1)
    file.close()

    again = RowFile(path, head, resume=True)
    assert again.rows == file.rows
    added: list[Row] = []
    sweep(small, grid, 0, again.rows, added.append, processes=1)
    assert len(added) == 1
    again.add(added[0])
    again.close()
    whole = RowFile(path, head, resume=True)
    whole.close()
    assert sorted(map(key_of, whole.rows)) == sorted(grid.combinations())


def test_a_row_that_broke_off_is_not_resumed(small: Trace, tmp_path: Path) -> None:
    path, head = tmp_path / "s.csv", {"fingerprint": "abc"}
    file = RowFile(path, head)
    for blocks in (10, 20):
        file.add(row_of(replay(small, Configuration(8, blocks)), f"{blocks}b"))
    file.close()
    path.write_text(path.read_text()[:-60])
    again = RowFile(path, head, resume=True)
    again.close()
    assert again.rows == file.rows[:1]


def test_rows_of_another_trace_are_not_resumed(tmp_path: Path) -> None:
    RowFile(tmp_path / "s.csv", {"trace": "mine", "fingerprint": "abc"}).close()
    with pytest.raises(InvalidRequest, match=r"rows of another trace \(mine\)"):
        RowFile(tmp_path / "s.csv", {"fingerprint": "def"}, resume=True)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid((3,), (parse_capacity("inf"),)), "block size 3 is not a power of two"),
        (Grid((64,), (parse_capacity("63"),)), "capacity 63 does not hold one block of 64"),
        (Grid((8,), (parse_capacity("inf"),), ("best",)), "no eviction policy 'best'; there are"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    small: Trace, grid: Grid, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        grid.check(small, 1000)


@pytest.mark.parametrize("text", ["", "x", "-5", "0k", "5k%", "1.2.3", "10x"])
def test_a_capacity_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="capacity"):
        parse_capacity(text)
