"""A router that is not ours follows the events: Dynamo's standalone indexer, in a namespace alone.

Needs `make dynamo-environment`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

import prefixcache
from core.follower import Follower
from patience import PATIENCE_S
from prefixcache.config import load
from prefixcache.core.tiers import LEVEL_BITS, Level
from prefixcache.service.events.event_log import EventLog
from prefixcache.service.failures import Failures
from service.events.test_tier_events import Tiered
from service.service_process import LAYOUT, ROOT, eventually, running, sizes
from service.test_haulage import slots

SIZE = 16
PYTHON = Path(os.environ.get("PREFIXCACHE_DYNAMO", ROOT / ".venv-dynamo" / "bin" / "python"))
CHAT = [*range(1, 65)]

pytest.importorskip("zmq", reason="the extra 'events' is not installed")
if not PYTHON.exists():
    pytest.skip(f"no {PYTHON}: make dynamo-environment", allow_module_level=True)


class Indexer:
    """The indexer, and one instance that it follows."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self.process, self.errors = process, errors

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([path, body]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        self.errors.seek(0)
        assert line, self.errors.read().decode()
        return json.loads(line)

    def follow(self, endpoint: str) -> None:
        about = {"instance_id": 1, "model_name": "m", "block_size": SIZE, "dp_rank": 0}
        answer = self.ask("/register", {"endpoint": endpoint, **about})
        assert "status" in answer, answer

    def matched(self, tokens: list[int]) -> tuple[int, int, int, int]:
        """Tokens of a prompt that it knows of: anywhere, in the GPU, down to the CPU, the disk."""
        answer = self.ask("/query", {"token_ids": tokens, "model_name": "m"})
        found = answer["instances"].get("1")
        if found is None:
            return 0, 0, 0, 0
        return found["longest_matched"], found["gpu"], found["cpu"], found["disk"]


@pytest.fixture
def indexer(tmp_path: Path) -> Iterator[Indexer]:
    script = Path(__file__).with_name("indexer.py")
    told = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    if told.returncode:
        pytest.skip(f"no network namespace to be had: {told.stderr.decode().strip()}")
    with (tmp_path / "indexer.log").open("w+b") as errors:
        process = subprocess.Popen(
            ["unshare", "-n", PYTHON, script, str(SIZE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        guard = threading.Timer(2 * PATIENCE_S, process.kill)
        guard.start()
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield Indexer(process, errors)
        finally:
            guard.cancel()
            process.communicate()


def test_a_prefix_stays_matched_as_a_whole_on_its_way_down_to_a_disk_and_up(
    indexer: Indexer, sockets: Path
) -> None:
    """From a pool on a GPU by the memory below it."""
    from prefixcache.service.events.publisher import Publisher  # of an extra

    endpoint = f"ipc://{sockets}/events"
    tiered = Tiered(16, 8, size=SIZE, space=prefixcache.Namespace("m"), disk=64)
    tiered.settings = load({"pool": "none", "watch_tokens": True})
    publisher = Publisher(tiered, Failures(), EventLog(tiered), endpoint, None)
    other = iter(range(1000, 100_000, 100))

    def levels() -> list[int]:
        """Where each block of the chat lies: in the pool 0, then 1 and 2."""
        found = {}
        for place, (_, tokens) in Follower(tiered.cache).truth().items():
            if list(tokens) == CHAT[: len(tokens)]:
                found[len(tokens)] = place >> LEVEL_BITS
        return [found.get(end, 3) for end in range(SIZE, len(CHAT) + 1, SIZE)]

    def matched() -> tuple[int, ...]:
        """What the indexer should say."""
        now = levels()
        ends = [next((at for at, one in enumerate(now) if one > most), len(now)) for most in Level]
        return (len(CHAT), *(SIZE * end for end in ends))

    async def push_down(*, until: Callable[[list[int]], bool]) -> None:
        """Use other blocks, and not the chat, until it lies as it should; the indexer follows."""
        while not until(levels()):
            first = next(other)
            tiered.store(*range(first, first + SIZE))
            tiered.carry()
        await follows()

    async def follows() -> None:
        seen = set()
        while True:
            now = await asyncio.to_thread(indexer.matched, CHAT)
            seen.add(now[0])
            if now == matched():
                break
            await asyncio.sleep(0.02)
        assert seen == {len(CHAT)}, "for a moment it was not known as a whole"

    async def story() -> None:
        publisher.start()
        await asyncio.to_thread(indexer.follow, endpoint)
        await asyncio.sleep(0.5)
        tiered.store(*CHAT)
        while (await asyncio.to_thread(indexer.matched, CHAT))[0] < len(CHAT):
            await asyncio.sleep(0.02)
        await follows()
        await push_down(until=lambda now: 1 in now)
        await push_down(until=lambda now: {1, 2} <= set(now))
        await push_down(until=lambda now: set(now) == {2})
        assert matched() == (64, 0, 0, 64)
        tiered.bring_back(*CHAT, 7)
        assert levels() == [0, 0, 0, 0]
        await follows()
        assert tiered.cache.reset(tiered.space)
        while (await asyncio.to_thread(indexer.matched, CHAT))[0]:
            await asyncio.sleep(0.02)
        await publisher.close()

    asyncio.run(asyncio.wait_for(story(), PATIENCE_S))


def test_what_goes_below_the_pool_of_a_service_is_still_matched(
    indexer: Indexer, sockets: Path
) -> None:
    """The pool of a CPU and the memory below it are one medium: there it stays."""
    endpoint = f"ipc://{sockets}/events"
    flags = [*sizes(64, SIZE), "--host", slots(400), "--events", endpoint, "--watch-tokens"]
    with (
        running(f"unix:{sockets}/s.sock", *flags, "--partial", "off") as service,
        prefixcache.connect(service.target) as client,
    ):
        eventually(lambda: "porter at work" in service.log())
        session = client.attach("m", LAYOUT)

        def store(tokens: list[int]) -> None:
            with session.acquire([*tokens, 0]) as lease:
                lease.commit(len(tokens))

        indexer.follow(endpoint)
        store(CHAT)
        eventually(lambda: indexer.matched(CHAT) == (64, 0, 64, 64))
        seen = set()
        for first in range(1000, 100_000, 1000):
            store([*range(first, first + 3 * SIZE)])
            seen.add(indexer.matched(CHAT))
            if client.lookup(prefixcache.Namespace("m"), [*CHAT, 0]).num_hit == 0:
                break
        assert client.lookup(prefixcache.Namespace("m"), [*CHAT, 0]).num_hit == 0
        eventually(lambda: client.snapshot().leaving == 0)
        seen.add(indexer.matched(CHAT))
        assert seen == {(64, 0, 64, 64)}
