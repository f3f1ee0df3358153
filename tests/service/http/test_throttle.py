"""Throttle: whoever asks the page without a pause waits, and the loop is free meanwhile."""

from __future__ import annotations

import asyncio
from time import monotonic

from starlette.responses import PlainTextResponse
from starlette.types import Message, Scope

from patience import PATIENCE_S
from prefixcache.service.http.http_server import Guard
from prefixcache.service.http.throttle import Throttle


def test_one_is_answered_at_a_time_in_the_order_in_which_they_came() -> None:
    said: list[str] = []

    async def ask(throttle: Throttle, name: str) -> None:
        async with throttle.turn():
            said.append(f"{name} begins")
            await asyncio.sleep(0)
            said.append(f"{name} ends")

    async def main() -> None:
        throttle = Throttle(8)
        await asyncio.gather(*(ask(throttle, name) for name in "abc"))

    asyncio.run(main())
    assert said == [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]


def test_they_rest_four_times_as_long_as_they_took() -> None:
    async def main() -> float:
        throttle = Throttle(8)
        busy = 0.0
        began = monotonic()
        for _ in range(3):
            async with throttle.turn():
                entered = monotonic()
                await asyncio.sleep(0.02)
                busy += monotonic() - entered
        async with throttle.turn():
            return busy / (monotonic() - began)

    assert asyncio.run(main()) <= 0.2


def test_one_that_gives_up_or_fails_holds_nobody_up() -> None:
    async def main() -> list[str]:
        throttle = Throttle(2)
        order: list[str] = []

        async def ask(name: str) -> None:
            async with throttle.turn():
                order.append(name)
                if name == "fails":
                    raise ValueError

        async with throttle.turn():
            leaves = asyncio.create_task(ask("leaves"))
            await asyncio.sleep(0)
            assert throttle.is_full
            leaves.cancel()
            await asyncio.gather(leaves, return_exceptions=True)
            assert not throttle.is_full
        await asyncio.gather(ask("fails"), ask("comes after"), return_exceptions=True)
        return order

    assert asyncio.run(main()) == ["fails", "comes after"]


def test_who_does_not_read_his_answer_holds_up_nobody_else() -> None:
    """The turn is for making an answer, not for sending it."""
    scope: Scope = {
        "type": "http", "method": "GET", "path": "/metrics", "headers": [(b"host", b"127.0.0.1:80")]
    }  # fmt: skip

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def main() -> list[str]:
        guard = Guard(PlainTextResponse("numbers"), 80, Throttle(8))
        said: list[str] = []

        async def stall(message: Message) -> None:
            said.append("stalled")
            await asyncio.Event().wait()

        async def read(message: Message) -> None:
            said.append(message["type"])

        slow = asyncio.create_task(guard(scope, receive, stall))
        while not said:
            await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            await guard(scope, receive, read)
        slow.cancel()
        return said

    assert asyncio.run(main()) == ["stalled", "http.response.start", "http.response.body"]
