"""The benchmark of tiers finds what it has left itself."""

from __future__ import annotations

from pathlib import Path

from prefixcache_bench.speed.tiers import start


def test_a_start_finds_the_blocks_that_were_left_for_it(tmp_path: Path) -> None:
    told = start(200, tmp_path)
    assert told.num_blocks == 189, "three chats"
    assert told.first_s > 0
