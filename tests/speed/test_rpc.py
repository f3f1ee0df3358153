"""The servers without a cache answer each shape of load, so that there is something to compare."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from prefixcache_bench.speed.rpc import CASES, Case, Load, Series, started

SHAPES = [case for case in CASES if case.num_tokens == 32_768 or case.shape == "extend"]
"""The longest prompt of each: for that one the service makes way before it asks."""


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    with started("stub", tmp_path_factory.mktemp("rpc")) as server:
        yield server


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.shape)
def test_the_stub_answers(stub: tuple[str, int], case: Case) -> None:
    series = Series()

    async def play() -> None:
        load = Load(*stub)
        await load.measure(case, 0.3, series)
        await load.channel.close()

    asyncio.run(play())
    assert series.per_s[0] > 0
