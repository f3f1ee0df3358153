"""A router that is not ours follows the events: Dynamo's standalone indexer, in a namespace alone.

Needs `make dynamo-environment`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

import prefixcache
from patience import PATIENCE_S
from prefixcache.config import load
from prefixcache.core.tiers import Level
from prefixcache.service.events.event_log import EventLog
from prefixcache.service.failures import Failures
from prefixcache.types import unpack
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


@pytest.mark.parametrize("level", [Level.HOST, Level.DISK])
def test_a_prefix_stays_matched_as_a_whole_on_its_way_down_and_up(
    indexer: Indexer, sockets: Path, level: Level
) -> None:
    """Of a pool on a GPU, with memory below it, or a disk."""
    from prefixcache.service.events.publisher import Publisher  # of an extra

    endpoint = f"ipc://{sockets}/events"
    tiered = Tiered(16, 64, size=SIZE, space=prefixcache.Namespace("m"))
    tiered.settings = load({"pool": "none", "watch_tokens": True})
    publisher = Publisher(tiered, Failures(), EventLog(tiered), endpoint, None)
    hauls = tiered.cache._lessor.hauls
    assert hauls is not None
    hauls.tier.level = level
    other = iter(range(1000, 100_000, 100))

    def push_down(num_blocks: int) -> None:
        """Have so many blocks of the chat go below: others are used, and it is not."""
        while below() < num_blocks:
            first = next(other)
            tiered.store(*range(first, first + SIZE))
            tiered.carry()

    def below() -> int:
        ghosts = [one for one in hauls.tier.order.values() if unpack(one.tokens)[0] <= len(CHAT)]
        return sum(len(one.places or ()) for one in ghosts)

    async def expect(*matched: int) -> None:
        seen = set()
        while True:
            now = await asyncio.to_thread(indexer.matched, CHAT)
            seen.add(now[0])
            if now == matched:
                break
            await asyncio.sleep(0.02)
        assert seen == {len(CHAT)}, "for a moment it was not known as a whole"

    async def story() -> None:
        publisher.start()
        await asyncio.to_thread(indexer.follow, endpoint)
        await asyncio.sleep(0.5)
        tiered.store(*CHAT)
        while (await asyncio.to_thread(indexer.matched, CHAT))[0] < 64:
            await asyncio.sleep(0.02)
        await expect(64, 64, 64, 64)
        push_down(1)
        num_above = len(CHAT) - SIZE * below()
        assert 0 < num_above < len(CHAT)
        await expect(64, num_above, 64 if level is Level.HOST else num_above, 64)
        push_down(4)
        await expect(64, 0, 64 if level is Level.HOST else 0, 64)
        tiered.bring_back(*CHAT, 7)
        await expect(64, 64, 64, 64)
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
