"""What goes wrong in real life: processes die, hang and drain; streams tear; garbage arrives."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
import pytest

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import AsyncClient, Client
from prefixcache.client.lease import SignsOfLife
from prefixcache.errors import InvalidRequest, LeaseExpired, PoolExhausted, ServiceUnavailable
from prefixcache.pool import map_pool
from prefixcache.types import Ledger, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import (
    LAYOUT,
    ServiceProcess,
    environment,
    eventually,
    running,
    sizes,
)


@pytest.fixture
def target(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/cache.sock"


@pytest.fixture
def service(target: str) -> Iterator[ServiceProcess]:
    with running(target, *sizes(64, 4), "--ttl", "1", "--grace", "5") as service:
        yield service


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[Client]:
    with prefixcache.connect(service.target) as client:
        yield client


class Victim:
    def __init__(self, target: str, num_tokens: int, num_committed: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.victim", target, str(num_tokens), str(num_committed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert self.read().startswith("holding")

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("commit\n")
        self.process.stdin.flush()
        return self.read()

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def test_a_killed_worker_gives_its_blocks_back_and_a_waiter_takes_over(client: Client) -> None:
    session = client.attach("model", LAYOUT)
    with Victim(str(client.address), 40) as victim:
        waiting = session.acquire_later(list(range(40)), wait_s=30.0)
        time.sleep(0.1)
        assert not waiting.done()
        victim.process.kill()
        killed_at = time.monotonic()
        lease = waiting.result(PATIENCE_S)
        assert time.monotonic() - killed_at < 1.0
    assert lease.ledger == Ledger(cold=40)
    # As soon as it is known that the worker has left no process that goes on in its place.
    eventually(lambda: client.snapshot().quarantined == 0)
    snapshot = client.snapshot()
    assert [info.lease for info in snapshot.leases] == [lease.id]
    assert snapshot.free == 64 - 10


def test_what_a_killed_worker_had_committed_stays(client: Client) -> None:
    session = client.attach("model", LAYOUT)
    with Victim(str(client.address), 40, 20) as victim:
        victim.process.kill()
        victim.process.wait()
        eventually(lambda: not client.snapshot().leases)
    assert session.acquire(list(range(40))).num_cached == 20


def test_a_stopped_worker_loses_its_lease_but_its_blocks_wait_for_its_death(
    client: Client,
) -> None:
    with Victim(str(client.address), 40) as victim:
        victim.process.send_signal(signal.SIGSTOP)
        eventually(lambda: not client.snapshot().leases)
        assert client.snapshot().quarantined == 10
        victim.process.send_signal(signal.SIGCONT)
        assert victim.ask() == "LeaseExpired"
        assert client.snapshot().quarantined == 10
        victim.process.kill()
        eventually(lambda: client.snapshot().free == 64)


def test_a_torn_stream_quarantines_until_the_worker_says_it_has_stopped(client: Client) -> None:
    session = client.attach("model", LAYOUT)
    lease = session.acquire(list(range(40)))
    session._call.cancel()
    eventually(lambda: not session.alive)
    with pytest.raises(ServiceUnavailable):
        lease.commit(40)
    eventually(lambda: client.snapshot().quarantined == 10)
    session.close()
    with client.attach("model", LAYOUT):
        assert client.snapshot().free == 64


@pytest.mark.parametrize("watched", [True, False])
def test_quarantine_ends_by_itself_only_where_a_death_cannot_be_seen(
    target: str, monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    if not watched:
        monkeypatch.setattr("prefixcache.client.connection.this_host", lambda: "another host")
    with (
        running(target, *sizes(64, 4), "--quarantine", "0.3") as service,
        prefixcache.connect(service.target) as client,
    ):
        session = client.attach("model", LAYOUT)
        session.acquire(list(range(40)))
        session._call.cancel()
        eventually(lambda: client.snapshot().quarantined == 10)
        if watched:
            time.sleep(0.6)
            assert client.snapshot().quarantined == 10
        else:
            eventually(lambda: client.snapshot().free == 64)


def test_a_drain_lets_leases_finish_and_gives_no_new_ones(
    service: ServiceProcess, client: Client
) -> None:
    session, other = client.attach("model", LAYOUT), client.attach("model", LAYOUT)
    lease = session.acquire(list(range(12)))
    waiting = other.acquire_later(list(range(13)), wait_s=30.0)
    time.sleep(0.1)
    service.signal(signal.SIGTERM)
    with pytest.raises(ServiceUnavailable, match="draining"):
        waiting.result(PATIENCE_S)
    with pytest.raises(ServiceUnavailable, match="draining"):
        session.acquire([1, 2, 3])
    with pytest.raises(ServiceUnavailable, match="draining"):
        client.attach("model", LAYOUT)
    assert lease.commit(12).num_tokens == 12
    assert service.process.poll() is None
    lease.release()
    assert service.wait(PATIENCE_S) == 0
    eventually(lambda: not session.alive)


def test_a_drain_ends_when_the_grace_is_over(target: str) -> None:
    with running(target, *sizes(64, 4), "--grace", "0.5") as service:
        client = prefixcache.connect(service.target)
        client.attach("model", LAYOUT).acquire([1, 2, 3])
        started = time.monotonic()
        service.signal(signal.SIGTERM)
        assert service.wait(PATIENCE_S) == 0
        assert 0.4 < time.monotonic() - started < 3.0
        client.close()


def test_a_second_ctrl_c_ends_at_once(service: ServiceProcess, client: Client) -> None:
    client.attach("model", LAYOUT).acquire([1, 2, 3])
    service.signal(signal.SIGINT)
    time.sleep(0.3)
    assert service.process.poll() is None
    started = time.monotonic()
    service.signal(signal.SIGINT)
    assert service.wait(PATIENCE_S) == 0
    assert time.monotonic() - started < 1.0


def test_a_user_who_keeps_pressing_ctrl_c_still_gets_a_clean_end(target: str) -> None:
    with running(target, "--pool", "none") as service:
        while service.process.poll() is None:
            service.signal(signal.SIGINT)
            time.sleep(0.005)
        assert service.wait() == 0
        assert "Traceback" not in service.log()


def test_a_clean_end_leaves_neither_socket_nor_memory(target: str) -> None:
    service = ServiceProcess(target, *sizes(64, 4))
    with prefixcache.connect(target) as client, client.attach("model", LAYOUT) as session:
        pool = session.pool
        map_pool(pool).close()
    assert service.stop() == 0
    assert not Path(target.removeprefix("unix:")).exists()
    assert not Path(pool.name).exists()


def test_a_killed_service_is_missed_and_its_successor_cleans_up(target: str) -> None:
    with running(target, *sizes(64, 4)) as first:
        client = prefixcache.connect(first.target)
        session = client.attach("model", LAYOUT)
        lease = session.acquire(list(range(12)))
        waiting = client.attach("model", LAYOUT).acquire_later(list(range(12)), wait_s=60.0)
        first.signal(signal.SIGKILL)
        first.wait()
        for act in (
            lambda: lease.commit(12),
            lambda: session.acquire([1]),
            lambda: session.snapshot(),
            lambda: waiting.result(PATIENCE_S),
            lambda: client.snapshot(),
            lambda: client.attach("model", LAYOUT),
            lambda: prefixcache.connect(target),
        ):
            with pytest.raises(ServiceUnavailable, match="prefixcache serve"):
                act()
        assert not session.alive
    pool = session.pool
    assert Path(pool.name).exists()  # nobody was left to remove it
    with running(target, *sizes(64, 4)):
        assert not Path(pool.name).exists()
        again = client.attach("model", LAYOUT)  # the same client finds the successor
        assert again.pool.epoch != pool.epoch
        assert again.acquire(list(range(12))).ledger.cold == 12
        client.close()


def test_a_second_service_at_the_same_address_is_refused(service: ServiceProcess) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "prefixcache.cli", "serve", "--listen", service.target],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert told.returncode == 4
    assert "a service is listening" in told.stderr
    assert "Traceback" not in told.stderr
    assert service.process.poll() is None


def test_a_hung_service_costs_the_chosen_time_and_no_more(service: ServiceProcess) -> None:
    client = prefixcache.connect(service.target, timeout_s=0.5)
    session = client.attach("model", LAYOUT)
    service.signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(ServiceUnavailable, match=r"0\.5 s"):
        session.acquire([1, 2, 3])
    with pytest.raises(ServiceUnavailable):
        session.acquire([1, 2, 3])
    assert time.monotonic() - started < 2.0
    service.signal(signal.SIGCONT)
    client.close()


def test_a_client_stops_using_a_lease_before_the_service_ends_it(client: Client) -> None:
    session = client.attach("model", LAYOUT, keep_alive=False)
    asked_at = time.monotonic()
    lease = session.acquire(list(range(12)))
    assert lease.deadline < asked_at + 1.0
    time.sleep(max(0.0, lease.deadline - time.monotonic()))
    assert client.snapshot().leases  # it still stands at the service
    with pytest.raises(LeaseExpired, match="sign of life"):
        lease.commit(12)


def test_a_client_that_was_stopped_does_not_take_its_leases_for_alive_because_it_is(
    client: Client,
) -> None:
    session = client.attach("model", LAYOUT, keep_alive=False)
    lease = session.acquire(list(range(12)))
    time.sleep(1.2)  # stopped; the service, with a ttl of 1 s, has ended the lease
    session.renew()  # the first thing that a heartbeat does after waking up
    with pytest.raises(LeaseExpired, match="sign of life"):
        lease.check()
    fresh = session.acquire(list(range(12)))
    time.sleep(0.6)
    session.renew()
    time.sleep(0.6)
    fresh.check()  # while one that was renewed in time stands
    assert fresh.commit(12).num_tokens == 12


def test_signs_of_life_prolong_a_lease_only_without_a_gap() -> None:
    signs = SignsOfLife()
    assert signs.deadline(10.0, 1.0) == 11.0
    signs.note(10.5, 10.6, 1.0)
    assert signs.deadline(10.0, 1.0) == 11.5
    assert signs.deadline(9.5, 1.0) == 10.5, "it had ended when the first one was answered"
    signs.note(11.4, 11.6, 1.0)  # in time when it was sent, too late when it was answered
    assert signs.deadline(10.0, 1.0) == 11.0
    assert signs.deadline(11.5, 1.0) == 12.5
    signs.note(12.0, 12.1, 1.0)
    assert signs.deadline(11.5, 1.0) == 13.0


def test_garbage_on_the_socket_hurts_nobody(service: ServiceProcess, client: Client) -> None:
    session = client.attach("model", LAYOUT)
    lease = session.acquire(list(range(12)))
    random = Random(7)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for start in (b"", b"GET / HTTP/1.1\r\n\r\n", preface, preface + b"\0" * 9):
        for size in (1, 100, 70_000):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
                raw.connect(str(client.address.path))
                try:
                    raw.sendall(start + random.randbytes(size))
                    raw.settimeout(0.05)
                    raw.recv(4096)
                except OSError:
                    continue  # hung up on us, or waits for more: both are right
    assert lease.commit(12).num_tokens == 12
    assert service.process.poll() is None


def test_bytes_that_are_no_message_end_only_their_own_stream(client: Client) -> None:
    session = client.attach("model", LAYOUT)
    stream: Any = client.channel.stream_stream("/prefixcache.v1.PrefixCache/Session", None, None)
    with pytest.raises(grpc.RpcError) as caught:
        list(stream(iter([b"\xff" * 50])))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "50 bytes" in str(caught.value.details())
    assert session.acquire([1, 2, 3]).ledger.cold == 3


def test_ops_before_attach_and_ops_without_a_verb_are_refused(client: Client) -> None:
    stream: Any = client.channel.stream_stream(
        "/prefixcache.v1.PrefixCache/Session",
        pb.OpBatch.SerializeToString,
        pb.OpResults.FromString,
    )
    batch = pb.OpBatch()
    batch.ops.add(id=5).extend.lease = 1
    batch.ops.add(id=6)
    (results,) = stream(iter([batch]))
    assert [(r.id, r.error.kind) for r in results.results] == [
        (5, "NotFound"),
        (6, "InvalidRequest"),
    ]


def test_too_many_ops_in_one_message_end_the_session_with_the_numbers(target: str) -> None:
    with (
        running(target, *sizes(64, 4), "--max-ops", "8") as service,
        prefixcache.connect(service.target) as client,
    ):
        stream: Any = client.channel.stream_stream(
            "/prefixcache.v1.PrefixCache/Session", pb.OpBatch.SerializeToString, None
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(stream(iter([pb.OpBatch(ops=[pb.Op(id=n) for n in range(9)])])))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "9 ops" in str(caught.value.details())
        # The client cuts its steps so that this never happens to it.
        session = client.attach("model", LAYOUT)
        with session.batch() as step:
            replies = [step.lookup([1, 2, 3]) for _ in range(20)]
        assert [reply.result().num_tokens for reply in replies] == [3] * 20


def test_a_message_over_the_limit_is_refused_with_the_numbers(client: Client) -> None:
    session = client.attach("model", LAYOUT)
    lease = session.acquire(list(range(12)))
    before = client.snapshot().free
    huge = np.zeros(16 * 2**18 + 1, dtype=np.int32)
    with pytest.raises(InvalidRequest, match=r"16,777,216"):
        session.acquire(huge)
    with session.batch() as batch:
        failed = batch.acquire(huge)
        done = batch.commit(lease, 12)
    with pytest.raises(InvalidRequest, match=r"16,777,216"):
        failed.result()
    assert done.result().num_tokens == 12
    with pytest.raises(InvalidRequest, match="16777216"):  # the service's own words
        client.lookup(prefixcache.Namespace("model"), huge)
    assert session.alive
    assert client.snapshot().free == before


def test_a_stream_with_a_message_over_the_limit_ends_alone(client: Client) -> None:
    session = client.attach("model", LAYOUT)
    stream: Any = client.channel.stream_stream("/prefixcache.v1.PrefixCache/Session", None, None)
    with pytest.raises(grpc.RpcError) as caught:
        list(stream(iter([bytes(2**24 + 1)])))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert session.acquire([1, 2, 3]).ledger.cold == 3


def test_a_million_tokens_fit_into_a_message(target: str) -> None:
    with (
        running(target, *sizes(2**17, 16), "--pool", "none") as service,
        prefixcache.connect(service.target) as client,
    ):
        session = client.attach("model", LAYOUT)
        lease = session.acquire(np.arange(2**20, dtype=np.int32))
        assert len(lease.block_table) == 2**16
        assert lease.commit(2**20).num_indexed == 2**16


def test_many_sessions_at_once_leave_nothing_behind(client: Client) -> None:
    def work(seed: int) -> int:
        random, done = Random(seed), 0
        with client.attach("model", LAYOUT) as session:
            for _ in range(40):
                length = random.randrange(1, 16)
                tokens = [0] * random.randrange(length) + list(range(seed, seed + length))
                try:
                    with session.acquire(tokens, wait_s=random.choice((0.0, 0.05))) as lease:
                        lease.commit(len(tokens))
                        if random.random() < 0.3:
                            left, right = lease.fork(2)
                            with left, right:
                                left.extend(len(tokens) + 1)
                    done += 1
                except PoolExhausted:
                    continue
        return done

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(work, range(8))) > 100
    left = client.snapshot()
    assert not left.leases
    assert (left.private, left.quarantined) == (0, 0)
    assert left.free + left.evictable == 64


def test_two_thousand_requests_leak_no_block(client: Client) -> None:
    session, random = client.attach("model", LAYOUT), Random(5)
    for _ in range(125):
        with session.batch() as step:
            prompts = [[random.randrange(3) for _ in range(9)] for _ in range(16)]
            replies = [step.acquire(tokens) for tokens in prompts]
        leases = [reply.result() for reply in replies]
        with session.batch() as step:
            for lease in leases:
                step.commit(lease, 9)
            for lease in leases:
                step.release(lease)
    left = client.snapshot()
    assert left.requests == 2000
    assert left.free + left.evictable == 64
    assert (left.private, left.quarantined, left.leases) == (0, 0, ())


def test_calls_beyond_the_limit_are_refused_at_once(target: str) -> None:
    with (
        running(target, *sizes(64, 4), "--max-calls", "2") as service,
        prefixcache.connect(service.target) as client,
    ):
        session = client.attach("model", LAYOUT)
        client.attach("model", LAYOUT)
        with pytest.raises(PoolExhausted):
            client.snapshot()
        assert session.acquire([1, 2, 3]).ledger.cold == 3


def test_one_session_serves_many_threads(client: Client) -> None:
    session = client.attach("model", LAYOUT)

    def work(seed: int) -> bool:
        for n in range(30):
            tokens = [seed * 100 + n] * 8
            with session.acquire(tokens) as lease:
                if lease.commit(8).num_tokens != 8:
                    return False
        return True

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(work, range(6)))
    assert not client.snapshot().leases


def test_closing_while_another_thread_waits_tells_it_so(client: Client) -> None:
    client.attach("model", LAYOUT).acquire(list(range(12)))
    session = client.attach("model", LAYOUT)
    told: list[BaseException] = []

    def wait() -> None:
        try:
            session.acquire(list(range(12)), wait_s=30.0)
        except ServiceUnavailable as error:
            told.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    session.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert "closed" in str(told[0])


def test_what_is_cancelled_or_lost_leaves_no_trace_in_the_client(
    service: ServiceProcess,
) -> None:
    before = set(threading.enumerate())
    client = prefixcache.connect(service.target)
    client.attach("model", LAYOUT).acquire(list(range(12)))
    session = client.attach("model", LAYOUT)
    waiting = session.acquire_later(list(range(12)), wait_s=30.0)
    eventually(lambda: client.snapshot().waiting == 1)
    waiting.cancel()
    eventually(lambda: client.snapshot().waiting == 0)
    assert session.acquire([1]).id
    assert not session._pending
    service.signal(signal.SIGKILL)
    eventually(lambda: not session.alive)
    client.close()
    eventually(lambda: not {t for t in threading.enumerate() if t not in before and t.is_alive()})


def test_the_pool_is_mapped_by_both_sides(client: Client) -> None:
    one, two = client.attach("model", LAYOUT).pool, client.attach("model", LAYOUT).pool
    assert one == two
    with map_pool(one) as mine, map_pool(two) as theirs:
        mine[one.offset : one.offset + 4] = pack([77])
        assert theirs[two.offset : two.offset + 4] == pack([77])
    assert oct(Path(one.name).stat().st_mode)[-3:] == "600"
    assert oct(Path(client.address.path).stat().st_mode)[-3:] == "600"


@pytest.mark.parametrize("why", ["refused", "service killed", "lease lost", "unary", "later"])
def test_a_caller_that_fails_lets_go_of_the_pool_at_once(
    service: ServiceProcess, client: Client, why: str
) -> None:
    # A worker that joins the next service still maps the former pool until it lets go of it, and so
    # long nobody is lent what it could write to.  The garbage collector comes too late for that.
    def work() -> None:
        session = client.attach("tiny", LAYOUT)
        memory = map_pool(session.pool)
        maps.append(weakref.ref(memory))
        lease = session.acquire([1, 2, 3])
        lease.commit(3)
        asked = session.acquire_later([1] * 10_000)
        if why == "later":
            asked.result(PATIENCE_S)
        if why in ("service killed", "unary"):
            service.signal(signal.SIGKILL)
            service.wait()
        if why == "lease lost":
            lease.mark_released()
            lease.commit(3)
        if why == "unary":
            client.explain(prefixcache.Namespace("tiny"), [1, 2, 3])
        session.acquire([1] * 10_000)

    async def work_async(client: AsyncClient) -> None:
        session = await client.attach("tiny", LAYOUT)
        memory = map_pool(session.pool)
        maps.append(weakref.ref(memory))
        await session.acquire([1] * 10_000)

    async def try_async() -> None:
        async with await prefixcache.connect_async(service.target) as client:
            with contextlib.suppress(InvalidRequest):
                await work_async(client)
                pytest.fail("it was served")
            assert [known() for known in maps] == [None]

    maps: list[weakref.ref[Any]] = []
    gc.disable()
    try:
        if why == "refused":
            asyncio.run(try_async())
        with contextlib.suppress(InvalidRequest, LeaseExpired, ServiceUnavailable):
            work()
            pytest.fail("it was served")
        assert [known() for known in maps] == [None] * len(maps)
    finally:
        gc.enable()
