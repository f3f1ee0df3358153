"""The collector of a service: cycles go soon, and no pause looks at much."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import deque

import pytest

from prefixcache.service import collector
from prefixcache.service.collector import TICK_S, collect_often


class Thing:
    """Something that lives as long as a run of the tree."""

    def __init__(self) -> None:
        self.other: Thing | None = None


async def beside_the_collector(seconds: float, make: object) -> int:
    """Call `make` again and again; give the most objects that were young when it was over."""
    assert callable(make)
    collecting = asyncio.ensure_future(collect_often())
    most, end = 0, asyncio.get_running_loop().time() + seconds
    looked: list[int] = []

    def look(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 0:
            looked.append(len(gc.get_objects(generation=0)))

    await asyncio.sleep(0)
    gc.callbacks.append(look)
    try:
        while asyncio.get_running_loop().time() < end:
            make()
            await asyncio.sleep(0.001)
    finally:
        gc.callbacks.remove(look)
        collecting.cancel()
    most = max(looked)
    await asyncio.gather(collecting, return_exceptions=True)
    return most


def test_a_full_cache_does_not_pile_up_young_objects() -> None:
    """As many are let go as are made, of which Python's own count sees nothing."""
    before = gc.get_threshold()
    live = deque((Thing() for _ in range(20_000)), maxlen=20_000)
    made = 0

    def make() -> None:
        nonlocal made
        made += 100
        live.extend([Thing() for _ in range(100)])

    most = asyncio.run(beside_the_collector(40 * TICK_S, make))
    assert made > 1_000
    assert most < max(made / 4, 5_000)
    assert gc.get_threshold() == before


def test_a_cycle_goes_soon() -> None:
    gone: list[weakref.ref[Thing]] = []

    def make() -> None:
        one, other = Thing(), Thing()
        one.other, other.other = other, one
        gone.append(weakref.ref(one))

    asyncio.run(beside_the_collector(20 * TICK_S, make))
    assert sum(ref() is None for ref in gone) > len(gone) / 2


def test_what_makes_many_objects_at_once_has_nobody_look_at_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After minutes: here the clock is quicker."""
    monkeypatch.setattr(collector, "TICK_S", 0.0)
    monkeypatch.setattr(collector, "_TICKS", 1)
    seen: list[int] = []

    def look(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    async def story() -> None:
        collecting = asyncio.ensure_future(collect_often())
        await asyncio.sleep(0)
        gc.callbacks.append(look)
        try:
            for _ in range(1_200):
                await asyncio.sleep(0)
            assert seen.count(1) > 1_000
            many = [Thing() for _ in range(60_000)]
            assert len(many)
        finally:
            gc.callbacks.remove(look)
            collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)

    asyncio.run(story())
    assert 2 not in seen
