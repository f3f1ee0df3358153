"""Turns: whoever asks the page without a pause waits, and the loop is free meanwhile."""

from __future__ import annotations

import asyncio
from time import monotonic

from prefixcache.service.http.turns import Turns


def test_one_is_answered_at_a_time_in_the_order_in_which_they_came() -> None:
    said: list[str] = []

    async def ask(turns: Turns, name: str) -> None:
        async with turns.turn():
            said.append(f"{name} begins")
            await asyncio.sleep(0)
            said.append(f"{name} ends")

    async def main() -> None:
        turns = Turns(8)
        await asyncio.gather(*(ask(turns, name) for name in "abc"))

    asyncio.run(main())
    assert said == [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]


def test_they_rest_four_times_as_long_as_they_took() -> None:
    async def main() -> float:
        turns = Turns(8)
        busy = 0.0
        began = monotonic()
        for _ in range(3):
            async with turns.turn():
                entered = monotonic()
                await asyncio.sleep(0.02)
                busy += monotonic() - entered
        async with turns.turn():
            return busy / (monotonic() - began)

    assert asyncio.run(main()) <= 0.2


def test_one_that_gives_up_or_fails_holds_nobody_up() -> None:
    async def main() -> list[str]:
        turns = Turns(2)
        order: list[str] = []

        async def ask(name: str) -> None:
            async with turns.turn():
                order.append(name)
                if name == "fails":
                    raise ValueError

        async with turns.turn():
            leaves = asyncio.create_task(ask("leaves"))
            await asyncio.sleep(0)
            assert turns.is_full
            leaves.cancel()
            await asyncio.gather(leaves, return_exceptions=True)
            assert not turns.is_full
        await asyncio.gather(ask("fails"), ask("comes after"), return_exceptions=True)
        return order

    assert asyncio.run(main()) == ["fails", "comes after"]
