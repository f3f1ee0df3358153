"""Clients that leave at random, on a front whose workers are played."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from patience import PATIENCE_S
from prefixcache_bench.speed import front_load
from prefixcache_bench.speed.front_load import Leavers, Memory, private_mib
from serving.bench import Bench, save_tokenizer


@pytest.mark.parametrize("fails", [False, True], ids=["all is well", "a path that is none"])
def test_who_stays_is_answered_and_who_leaves_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    save_tokenizer(tmp_path)
    if fails:
        monkeypatch.setattr(front_load, "_PATHS", ("/v1/none",))

    async def main() -> Leavers:
        bench = Bench(tmp_path)
        async with asyncio.timeout(PATIENCE_S), bench.listening() as address, bench.stepping(1e-3):
            leavers = Leavers(f"http://{address}/v1", "played", seed=1)

            def run() -> None:
                with leavers.running(2):
                    asyncio.run_coroutine_threadsafe(enough(leavers), loop).result()

            loop = asyncio.get_running_loop()
            await asyncio.to_thread(run)
            while bench.front.num_open:
                await asyncio.sleep(0.01)
            assert (bench.router.num_running, bench.router.num_waiting) == (0, 0)
            if not fails:
                assert bench.meter.gone._value.get() > 0
        return leavers

    async def enough(leavers: Leavers) -> None:
        ways = 1 if fails else len(front_load._WAYS)
        while len(leavers.did) < ways or (fails and not leavers.wrong):
            await asyncio.sleep(0.01)

    leavers = asyncio.run(main())
    assert bool(leavers.wrong) is fails, leavers.wrong
    if fails:
        assert "404" in leavers.wrong[0]


def test_memory_of_a_process_that_is_gone_is_not_known() -> None:
    assert private_mib(2**22 + 1) is None
    memory = Memory({"w1": [100.0] * 6, "w2": [100.0, 100.0, 100.0, 130.0, 160.0, 190.0]})
    assert [one.split()[0] for one in memory.growing()] == ["w2"]
