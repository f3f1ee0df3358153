"""Shadow caches: the same life in another cache, on the very same requests, at no one's cost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prefixcache
from patience import PATIENCE_S
from prefixcache.config import ShadowSpec, load, parse_shadow
from prefixcache.core.cache import PrefixCache
from prefixcache.core.oplog import COMMITTED, ENDED, GRANTED, Entry
from prefixcache.errors import CacheError, InvalidRequest, PoolExhausted
from prefixcache.service.shadow.caches import ShadowCaches
from prefixcache.service.shadow.oplog_codec import read_chunk, write_chunk
from prefixcache.service.shadow.process import ShadowCache
from prefixcache.types import Namespace, Partial, WorkerId, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import (
    LAYOUT,
    ServiceProcess,
    command,
    environment,
    eventually,
    running,
    sizes,
)

ME, SPACE = WorkerId("w"), Namespace("m")
ENTRIES = st.tuples(
    st.integers(0, 5),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    st.binary(max_size=40),
    st.sampled_from([None, Namespace("a"), Namespace("b", "c", "d", "e")]),
)


@given(st.lists(st.lists(ENTRIES, max_size=6), max_size=5))
def test_what_is_read_is_what_was_written(chunks: list[list[Entry]]) -> None:
    stream = io.BytesIO(b"".join(part for entries in chunks for part in write_chunk(1.5, entries)))
    for entries in chunks:
        chunk = read_chunk(stream)
        assert chunk is not None
        assert chunk.now == 1.5
        spaces = chunk.namespaces
        at, read = 0, []
        for kind, lease, number, length, space in zip(*chunk[2:7], strict=True):
            data = chunk.payload[at : at + length]
            at += length
            read.append((kind, lease, number, data, spaces[space] if space >= 0 else None))
        assert read == entries
    assert read_chunk(stream) is None
    assert (
        read_chunk(io.BytesIO(b"".join(write_chunk(0.0, [(0, 1, 2, b"abc", None)]))[:-1])) is None
    )


def test_salts_that_are_used_once_leave_nothing_in_a_shadow() -> None:
    """Also no refusal: at the limit of namespaces, one that is only cached makes way."""
    shadow = ShadowCache("x", PrefixCache(8, 1, max_namespaces=32))
    most = 0
    for n in range(1000):
        space = Namespace("m", salt=str(n))
        shadow.play(GRANTED, n, 0, pack([n, n + 1]), space, 0.0)
        shadow.play(COMMITTED, n, 2, b"", None, 0.0)
        shadow.play(ENDED, n, 0, b"", None, 0.0)
        most = max(most, len(shadow.cache.namespaces()))
    shadow.cache.check()
    assert most <= 32
    assert not shadow._leases
    assert (shadow.whole.requests, shadow.whole.refused) == (1000, 0)


def live(cache: PrefixCache, draw: random.Random, steps: int) -> None:
    """Live as workers do: chats that come back, generate, fork, roll back, are reset."""
    cache.attach(ME, SPACE, now=0.0)
    chats = [[draw.randrange(9) for _ in range(draw.randrange(5, 30))] for _ in range(8)]
    held: list[tuple[Any, list[int]]] = []
    for step in range(steps):
        now = step * 0.5
        choice = draw.random()
        if held and choice < 0.35:
            cache.release(ME, held.pop(draw.randrange(len(held)))[0], now=now)
            continue
        if held and choice < 0.45:
            lease, tokens = draw.choice(held)
            (child,) = cache.fork(ME, lease, 1, now=now)
            held.append((child.lease, tokens[:]))
            continue
        if choice < 0.46:
            cache.reset(SPACE)
        chat = draw.choice(chats)
        try:
            grant = cache.acquire(ME, SPACE, pack(chat), now=now)
        except PoolExhausted:
            continue
        cache.commit(ME, grant.lease, len(chat), now=now)
        held.append((grant.lease, chat[:]))
        new = [draw.randrange(9) for _ in range(draw.randrange(1, 9))]
        try:
            cache.extend(ME, grant.lease, len(chat) + len(new), now=now)
        except PoolExhausted:
            continue
        cache.commit(ME, grant.lease, len(chat) + len(new), pack(new), now=now)
        if draw.random() < 0.3:
            with contextlib.suppress(PoolExhausted):
                cache.truncate(ME, grant.lease, len(chat), now=now)
        elif len(chat) < 60:
            chat += new


def played(tape: list[Entry], shadow: ShadowCache) -> ShadowCache:
    for step, (kind, lease, number, data, space) in enumerate(tape):
        shadow.play(kind, lease, number, data, space, step / 10)
        shadow.cache.check()
    return shadow


@pytest.mark.parametrize("seed", range(6))
def test_a_shadow_of_the_same_configuration_reuses_the_same(seed: int) -> None:
    cache, tape = PrefixCache(400, 4), []
    cache.record(tape.append)
    live(cache, random.Random(seed), 150)
    shadow = played(tape, ShadowCache("same", PrefixCache(400, 4, ttl_s=1e12)))
    ledger = cache.snapshot(now=0.0).ledger
    assert shadow.whole.tokens == ledger.total
    assert shadow.whole.actual == shadow.whole.reused == ledger.reused > 0
    assert shadow.whole.refused == 0


@pytest.mark.parametrize("policy", ["lru", "slru", "sieve"])
@pytest.mark.parametrize(("num_blocks", "size"), [(20, 4), (200, 16), (12, 1)])
def test_any_other_configuration_lives_through_it_too(
    policy: str, num_blocks: int, size: int
) -> None:
    cache, tape = PrefixCache(60, 4), []
    cache.record(tape.append)
    live(cache, random.Random(7), 200)
    other = PrefixCache(num_blocks, size, policy=policy, partial=Partial.OFF, ttl_s=1e12)
    shadow = played(tape, ShadowCache("other", other))
    assert shadow.whole.tokens == cache.snapshot(now=0.0).ledger.total
    cache.record(None)
    count = len(tape)
    live(cache, random.Random(8), 20)
    assert len(tape) == count
    ends = {lease for kind, lease, *_ in tape if kind == ENDED}
    begins = {lease for kind, lease, *_ in tape if kind == GRANTED}
    assert begins & ends
    assert any(kind == COMMITTED and data for kind, _, _, data, _ in tape)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("policy", "cannot read 'policy'"),
        ("size=3", "any of policy, block_size, memory, partial"),
        ("block_size=3", "not a power of two"),
        ("block_size=4096", "not from 1 to 1024"),
        ("memory=much", "cannot read the size"),
        ("policy=lru,policy=lru", "each once"),
    ],
)
def test_a_shadow_that_cannot_be_is_refused_with_the_cause(text: str, cause: str) -> None:
    with pytest.raises(InvalidRequest, match=f"--shadow: .*{cause}"):
        load({"shadow": [text]})


def test_shadows_are_read_from_flags_and_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PREFIXCACHE_SHADOW", "policy=slru; memory=1GiB,partial=off")
    first, second = load({}).shadow
    assert first == ShadowSpec("policy=slru", policy="slru")
    assert second == parse_shadow("partial=off,memory=1024MiB")
    assert second.name == "memory=1GiB,partial=off"
    with pytest.raises(InvalidRequest, match="at most 4"):
        load({"shadow": ["policy=lru"] * 5})
    settings = load({"shadow": ["policy=belief"]})
    with pytest.raises(InvalidRequest, match="no eviction policy 'belief'"):
        ShadowCaches(settings, None)  # type: ignore[arg-type]


# ------------------------------------------------------------------------ a real service


def send(target: str, rounds: int = 1) -> None:
    """Chats of 40 tokens under a prompt of 30, each in turn: more than the pool's 24 blocks."""
    with prefixcache.connect(target) as client:
        session = client.attach("model", LAYOUT)
        for _ in range(rounds):
            for chat in range(4):
                prompt = [*range(30), *range(1000 * chat, 1000 * chat + 10)]
                with session.acquire(prompt) as lease:
                    lease.commit(len(prompt))


def told(service: ServiceProcess, requests: int) -> pb.SnapshotResponse:
    """Wait until the shadows have seen so many requests."""
    with prefixcache.connect(service.target) as client:

        def ask() -> pb.SnapshotResponse:
            return client.call("snapshot", pb.SnapshotRequest())

        eventually(lambda: any(s.whole.requests >= requests for s in ask().shadows))
        return ask()


def test_what_if_compares_configurations_on_the_same_requests(sockets: Path) -> None:
    flags = ["--shadow", "memory=64KiB", "--shadow", "block_size=16,partial=off"]
    with running(f"unix:{sockets}/whatif.sock", *sizes(16, 4), *flags) as service:
        assert "shadow caches: memory=64KiB · block_size=16,partial=off" in service.lines
        send(service.target, rounds=5)
        larger, coarser = told(service, 20).shadows
        with prefixcache.connect(service.target) as client:
            ledger = client.snapshot().ledger
        for shadow in (larger, coarser):
            assert shadow.whole.requests == 20
            assert shadow.whole.tokens == ledger.total == 20 * 40
            assert shadow.whole.actual == ledger.reused
            assert shadow.last_hour == shadow.whole
        assert larger.whole.reused == 3 * 30 + 16 * 39
        assert coarser.whole.reused < ledger.reused < larger.whole.reused
        lines = subprocess.run(
            command("what-if", "--connect", service.target),
            env=environment(),
            capture_output=True,
            text=True,
        )
        rate = f"{larger.whole.reused / 800:.1%} instead of {ledger.reused / 800:.1%}"
        assert f"would have been {rate.replace('%', ' %')} (20 requests" in lines.stdout
        assert lines.returncode == 0
        shown = subprocess.run(
            command("what-if", "--connect", service.target, "--json"),
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert json.loads(shown.stdout)["shadows"][0]["whole"]["reused"] == larger.whole.reused
        assert service.stop() == 0


def test_without_shadows_what_if_says_how_to_have_them(sockets: Path) -> None:
    with running(f"unix:{sockets}/none.sock", *sizes(16, 4)) as service:
        lines = subprocess.run(
            command("what-if", "--connect", service.target),
            env=environment(),
            capture_output=True,
            text=True,
        )
    assert lines.returncode == 1
    assert "--shadow policy=slru,block_size=32" in lines.stdout


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_service_goes_on_when_the_shadows_process_is_killed(sockets: Path) -> None:
    flags = ["--shadow", "policy=slru"]
    with running(f"unix:{sockets}/killed.sock", *sizes(16, 4), *flags) as service:
        send(service.target)
        told(service, 4)
        (shadow,) = children(service.process.pid)
        os.kill(shadow, signal.SIGKILL)
        eventually(lambda: "shadow caches failed" in service.log())
        with prefixcache.connect(service.target) as client:
            told_of = client.call("snapshot", pb.SnapshotRequest()).service.failures
        assert told_of["shadow caches"] == "their process has ended"
        doctor = subprocess.run(
            command("doctor", "-c", service.target),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert doctor.returncode == 1
        assert "Shadow caches failed" in " ".join(doctor.stdout.split())
        send(service.target, rounds=3)
        assert service.stop() == 0


def test_the_shadows_process_ends_with_a_killed_service(sockets: Path) -> None:
    flags = ["--shadow", "policy=slru"]
    with running(f"unix:{sockets}/gone.sock", *sizes(16, 4), *flags) as service:
        send(service.target)
        (shadow,) = children(service.process.pid)
        service.process.kill()
        service.process.wait()
        eventually(lambda: not Path(f"/proc/{shadow}").exists() or is_zombie(shadow))


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_requests_that_a_stopped_process_cannot_take_are_left_out_and_counted(
    sockets: Path,
) -> None:
    """It is stopped until more than fits has piled up, and goes on without what was left out."""
    flags = ["--shadow", "policy=slru", "--max-shadow-lag", "256KiB"]
    with running(f"unix:{sockets}/stopped.sock", *sizes(256, 4), *flags) as service:
        send(service.target)
        told(service, 4)
        (shadow,) = children(service.process.pid)
        os.kill(shadow, signal.SIGSTOP)
        try:
            with prefixcache.connect(service.target) as client:
                session = client.attach("model", LAYOUT)
                deadline = time.monotonic() + PATIENCE_S
                while "requests are left out" not in service.log():
                    assert time.monotonic() < deadline
                    for number in range(50):
                        session.acquire([number] * 900).release()
                dropped = 0
                while not dropped:
                    session.acquire([1] * 900).release()
                    dropped = client.call("snapshot", pb.SnapshotRequest()).shadow_dropped
                before = client.snapshot().requests
        finally:
            os.kill(shadow, signal.SIGCONT)

        def caught_up() -> bool:
            send(service.target)
            with prefixcache.connect(service.target) as client:
                message = client.call("snapshot", pb.SnapshotRequest())
            (info,) = message.shadows
            seen = info.whole.requests + message.shadow_dropped
            return info.whole.requests > 100 and seen >= before and message.shadow_dropped > 0

        eventually(caught_up)
        assert service.stop() == 0


def test_an_op_never_fails_because_of_the_log() -> None:
    """A step that fails puts nothing on the tape; what is on it has happened."""
    cache, tape = PrefixCache(4, 4), []
    cache.record(tape.append)
    cache.attach(ME, SPACE, now=0.0)
    with pytest.raises(CacheError):
        cache.acquire(ME, SPACE, pack(range(40)), now=0.0)
    grant = cache.acquire(ME, SPACE, pack(range(10)), now=0.0)
    with pytest.raises(InvalidRequest):
        cache.commit(ME, grant.lease, 99, now=0.0)
    assert [kind for kind, *_ in tape] == [GRANTED]
    cache.expire(now=1000.0)
    assert [kind for kind, *_ in tape] == [GRANTED, ENDED]
