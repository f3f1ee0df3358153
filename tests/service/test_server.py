"""The service as any gRPC client sees it: unary calls, rich errors, health, reflection, start."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import codec
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import CacheError, InvalidRequest, LayoutMismatch, PoolExhausted
from prefixcache.service.grpc.listener import Listener
from prefixcache.types import Layout, Namespace, WorkerId, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache.v1.prefixcache_pb2_grpc import PrefixCacheStub
from service.service_process import LAYOUT, ServiceProcess, environment, eventually, running, sizes


@pytest.fixture(scope="module")
def service(sockets: Path) -> Iterator[ServiceProcess]:
    with running(f"unix:{sockets}/service.sock", *sizes(64, 4), "--ttl", "1") as service:
        yield service


@pytest.fixture
def stub(service: ServiceProcess) -> Iterator[Any]:
    """What `grpcio-tools` makes for anybody: nothing of this project's client."""
    with grpc.insecure_channel(service.target) as channel:
        yield PrefixCacheStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture
def key(stub: Any) -> Iterator[str]:
    answer = stub.Attach(attach_request())
    yield answer.worker_key
    stub.Detach(pb.DetachRequest(worker_key=answer.worker_key))


def attach_request(layout: Layout = LAYOUT, model: str = "unary") -> pb.AttachRequest:
    request = pb.AttachRequest()
    codec.write_namespace(Namespace(model), request.namespace)
    codec.write_layout(layout, request.layout)
    return request


def refused(call: Any) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """Make a call that must fail; give its status, its message and its details by type."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)
    assert status is not None, caught.value
    details: dict[str, Any] = {}
    for packed in status.details:
        for cls in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
            if packed.Is(cls.DESCRIPTOR):
                details[cls.__name__] = cls.FromString(packed.value)
    return caught.value.code(), caught.value.details(), details


def test_every_verb_works_as_a_unary_call(stub: Any, key: str) -> None:
    tokens = pack(range(10))
    grant = stub.Acquire(pb.AcquireRequest(worker_key=key, tokens=tokens, reserve=2)).grant
    assert len(grant.block_table) == 4 * 3
    done = stub.Commit(pb.CommitRequest(worker_key=key, lease=grant.lease, num_tokens=10))
    assert (done.num_tokens, done.num_indexed) == (10, 3)
    room = stub.Extend(pb.ExtendRequest(worker_key=key, lease=grant.lease, num_tokens=13))
    assert (room.keep, len(room.blocks)) == (3, 4)
    (child,) = stub.Fork(pb.ForkRequest(worker_key=key, lease=grant.lease, count=1)).children
    assert child.num_cached == 10
    cut = stub.Truncate(pb.TruncateRequest(worker_key=key, lease=child.lease, num_tokens=8))
    assert cut.keep <= 3
    stub.Renew(pb.RenewRequest(worker_key=key))
    found = stub.Lookup(pb.LookupRequest(worker_key=key, tokens=tokens))
    assert found.num_hit + found.num_partial == 9
    told = stub.Explain(pb.ExplainRequest(worker_key=key, tokens=pack([0, 1, 2, 3, 77])))
    assert told.HasField("parted_at")
    assert told.parted_at == 4
    stub.Release(pb.ReleaseRequest(worker_key=key, lease=child.lease))
    stub.Release(pb.ReleaseRequest(worker_key=key, lease=grant.lease))
    assert stub.Reset(pb.ResetRequest(worker_key=key)).num_blocks == 3
    seen = stub.Snapshot(pb.SnapshotRequest())
    assert seen.service.pool.num_blocks == seen.num_blocks == 64
    assert not seen.leases


def test_a_unary_acquire_waits_and_hanging_up_gives_up(stub: Any, key: str) -> None:
    tokens = pack(range(500, 512))
    first = stub.Acquire(pb.AcquireRequest(worker_key=key, tokens=tokens)).grant
    other = stub.Attach(attach_request()).worker_key
    waiting = pb.AcquireRequest(worker_key=other, tokens=tokens, wait_s=20.0)
    call = stub.Acquire.future(waiting)
    eventually(lambda: stub.Snapshot(pb.SnapshotRequest()).waiting == 1)
    call.cancel()
    eventually(lambda: stub.Snapshot(pb.SnapshotRequest()).waiting == 0)
    call = stub.Acquire.future(waiting)
    eventually(lambda: stub.Snapshot(pb.SnapshotRequest()).waiting == 1)
    stub.Commit(pb.CommitRequest(worker_key=key, lease=first.lease, num_tokens=12))
    assert call.result(PATIENCE_S).grant.ledger.joined > 0
    stub.Detach(pb.DetachRequest(worker_key=other))


def test_a_worker_that_leaves_ends_its_waiting_calls(stub: Any, key: str) -> None:
    tokens = pack(range(600, 612))
    stub.Acquire(pb.AcquireRequest(worker_key=key, tokens=tokens))
    other = stub.Attach(attach_request()).worker_key
    call = stub.Acquire.future(pb.AcquireRequest(worker_key=other, tokens=tokens, wait_s=20.0))
    eventually(lambda: stub.Snapshot(pb.SnapshotRequest()).waiting == 1)
    stub.Detach(pb.DetachRequest(worker_key=other))
    with pytest.raises(grpc.RpcError) as caught:
        call.result(PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_silent_unary_worker_is_detached_after_its_ttl(stub: Any) -> None:
    silent = stub.Attach(attach_request()).worker_key
    stub.Acquire(pb.AcquireRequest(worker_key=silent, tokens=pack(range(700, 712))))
    eventually(lambda: stub.Snapshot(pb.SnapshotRequest()).service.workers == 0)
    code, _, _ = refused(lambda: stub.Renew(pb.RenewRequest(worker_key=silent)))
    assert code is grpc.StatusCode.NOT_FOUND
    assert stub.Snapshot(pb.SnapshotRequest()).quarantined == 3
    stub.Detach(
        pb.DetachRequest(
            worker_key=stub.Attach(
                pb.AttachRequest(
                    namespace=attach_request().namespace,
                    layout=attach_request().layout,
                    finished=[silent],
                )
            ).worker_key
        )
    )
    assert stub.Snapshot(pb.SnapshotRequest()).quarantined == 0


BAD: dict[str, tuple[Any, grpc.StatusCode, str, str]] = {
    "torn tokens": (
        lambda stub, key: stub.Acquire(pb.AcquireRequest(worker_key=key, tokens=b"12345")),
        grpc.StatusCode.INVALID_ARGUMENT,
        "InvalidRequest",
        "5",
    ),
    "more tokens than the pool": (
        lambda stub, key: stub.Acquire(pb.AcquireRequest(worker_key=key, tokens=bytes(4 * 257))),
        grpc.StatusCode.INVALID_ARGUMENT,
        "InvalidRequest",
        "64",
    ),
    "an unknown lease": (
        lambda stub, key: stub.Extend(pb.ExtendRequest(worker_key=key, lease=987654, num_tokens=4)),
        grpc.StatusCode.NOT_FOUND,
        "NotFound",
        "987654",
    ),
    "an unknown worker": (
        lambda stub, key: stub.Acquire(pb.AcquireRequest(worker_key="guess", tokens=bytes(4))),
        grpc.StatusCode.NOT_FOUND,
        "NotFound",
        "attach",
    ),
    "an unknown namespace": (
        lambda stub, key: stub.Acquire(
            pb.AcquireRequest(worker_key=key, namespace_index=7, tokens=bytes(4))
        ),
        grpc.StatusCode.NOT_FOUND,
        "NotFound",
        "7",
    ),
    "a foreign layout": (
        lambda stub, key: stub.Attach(attach_request(Layout(1, 1, 8, "float32"))),
        grpc.StatusCode.INVALID_ARGUMENT,
        "LayoutMismatch",
        "1x1x4:float32.*1x1x8:float32",
    ),
    "no layout": (
        lambda stub, key: stub.Attach(pb.AttachRequest(namespace=pb.Namespace(model="m"))),
        grpc.StatusCode.INVALID_ARGUMENT,
        "LayoutMismatch",
        "0x0x0",
    ),
    "no model": (
        lambda stub, key: stub.Attach(attach_request(model="")),
        grpc.StatusCode.INVALID_ARGUMENT,
        "InvalidRequest",
        "model",
    ),
    "a name that is no name": (
        lambda stub, key: stub.Attach(
            pb.AttachRequest(
                namespace=pb.Namespace(model="m"), layout=attach_request().layout, name="a\x1b[2J"
            )
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "InvalidRequest",
        "printable",
    ),
    "a text without end": (
        lambda stub, key: stub.Attach(attach_request(model="m" * 2000)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "InvalidRequest",
        "2,000",
    ),
    "a wait without end": (
        lambda stub, key: stub.Acquire(
            pb.AcquireRequest(worker_key=key, tokens=bytes(4), wait_s=float("inf"))
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "InvalidRequest",
        "600",
    ),
    "a wait that is no number": (
        lambda stub, key: stub.Acquire(
            pb.AcquireRequest(worker_key=key, tokens=bytes(4), wait_s=float("nan"))
        ),
        grpc.StatusCode.INVALID_ARGUMENT,
        "InvalidRequest",
        "nan",
    ),
    "a fork into thousands": (
        lambda stub, key: stub.Fork(pb.ForkRequest(worker_key=key, lease=1, count=5000)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "InvalidRequest",
        "1024",
    ),
    "a lookup nowhere": (
        lambda stub, key: stub.Lookup(pb.LookupRequest(tokens=bytes(4))),
        grpc.StatusCode.INVALID_ARGUMENT,
        "InvalidRequest",
        "namespace",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_gets_its_status_its_class_and_its_numbers_and_changes_nothing(
    stub: Any, key: str, case: str
) -> None:
    def state() -> Any:
        seen = stub.Snapshot(pb.SnapshotRequest())
        seen.service.uptime_s = 0.0
        for moving in ("verbs", "workers", "requests_per_s", "eviction_age_s"):
            seen.ClearField(moving)  # what only time and the asking itself change
        return seen

    call, expected, kind, text = BAD[case]
    before = state()
    code, message, details = refused(lambda: call(stub, key))
    assert code is expected
    assert details["ErrorInfo"].reason == kind
    assert details["ErrorInfo"].domain == "prefixcache"
    assert re.search(text, message), message
    assert state() == before


def test_a_full_pool_carries_a_retry_hint(stub: Any, key: str) -> None:
    stub.Acquire(pb.AcquireRequest(worker_key=key, tokens=pack(range(200))))
    code, message, details = refused(
        lambda: stub.Acquire(pb.AcquireRequest(worker_key=key, tokens=pack(range(1000, 1200))))
    )
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "50 blocks" in message
    delay = details["RetryInfo"].retry_delay.ToTimedelta().total_seconds()
    assert 0 < delay <= 1.0


def test_one_worker_can_work_in_several_namespaces(stub: Any, key: str) -> None:
    request = attach_request(model="second")
    request.worker_key = key
    answer = stub.Attach(request)
    assert (answer.worker_key, answer.namespace_index) == (key, 1)
    tokens = pack(range(800, 808))
    lease = stub.Acquire(
        pb.AcquireRequest(worker_key=key, namespace_index=1, tokens=tokens)
    ).grant.lease
    stub.Commit(pb.CommitRequest(worker_key=key, lease=lease, num_tokens=8))

    def hits(index: int) -> int:
        request = pb.LookupRequest(worker_key=key, namespace_index=index, tokens=tokens)
        return int(stub.Lookup(request).num_hit)

    assert (hits(0), hits(1)) == (0, 4)


def test_the_health_service_tells_serving_and_not_serving(sockets: Path) -> None:
    with running(f"unix:{sockets}/health.sock", *sizes(64, 4)) as service:
        client = prefixcache.connect(service.target)
        session = client.attach("m", LAYOUT)
        session.acquire([1, 2, 3])
        health = health_pb2_grpc.HealthStub(client.channel)
        name = health_pb2.HealthCheckRequest(service="prefixcache.v1.PrefixCache")
        assert health.Check(name).status == health_pb2.HealthCheckResponse.SERVING
        service.signal(signal.SIGTERM)
        eventually(lambda: health.Check(name).status == health_pb2.HealthCheckResponse.NOT_SERVING)
        assert client.call("snapshot", pb.SnapshotRequest()).service.draining
        client.close()
        assert service.wait(PATIENCE_S) == 0


def test_reflection_can_be_switched_off(service: ServiceProcess, sockets: Path) -> None:
    def names(target: str) -> list[str]:
        with grpc.insecure_channel(target) as channel:
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([ask])
            )
            return [entry.name for entry in answer.list_services_response.service]

    assert "prefixcache.v1.PrefixCache" in names(service.target)
    with (
        running(f"unix:{sockets}/dark.sock", *sizes(64, 4), "--no-reflection") as dark,
        pytest.raises(grpc.RpcError) as caught,
    ):
        names(dark.target)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_first_worker_decides_the_layout_where_nobody_did(sockets: Path) -> None:
    with (
        running(f"unix:{sockets}/first.sock", "--memory", "64KiB", "--block-size", "4") as service,
        prefixcache.connect(service.target) as client,
    ):
        assert client.snapshot().num_blocks == 0
        with pytest.raises(InvalidRequest, match="one block"):
            client.attach("m", Layout(1000, 8, 128, "float32"))
        session = client.attach("m", LAYOUT)
        assert session.pool.num_blocks == client.snapshot().num_blocks == 64 * 1024 // 128
        with pytest.raises(LayoutMismatch):
            client.attach("m", Layout(2, 1, 4, "float32"))


def test_loopback_tcp_works_and_tells_its_port() -> None:
    with running("127.0.0.1:0", *sizes(64, 4)) as service:
        assert service.target.startswith("127.0.0.1:")
        assert not service.target.endswith(":0")
        with prefixcache.connect(service.target) as client:
            assert client.attach("m", LAYOUT).acquire([1, 2, 3]).ledger.cold == 3


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--listen", "0.0.0.0:7070"], 2, "127.0.0.1:PORT"),
        (["--listen", "example.org:7070"], 2, "refused"),
        (["--listen", "nonsense"], 2, "unix:/path"),
        (["--listen", f"unix:/tmp/{'x' * 120}"], 2, "107"),
        (["--memory", "lots"], 2, "--memory.*'lots'"),
        (["--memory", "1KiB", "--layout", "30x3x64"], 2, "360 KiB.*1 KiB"),
        (["--block-size", "12"], 2, "power of two"),
        (["--layout", "30x3"], 2, "30x3x64:bfloat16"),
        (["--layout", "1x1x1:int8"], 2, "int8"),
        (["--policy", "nosuch", "--layout", "1x1x1"], 2, "nosuch"),
        (["--partial", "some"], 2, "tails"),
        (["--model", "/nonexistent"], 2, "config.json"),
        (["--nosuch"], 2, "nosuch"),
    ],
)
def test_a_service_that_cannot_start_says_why_in_one_line(
    flags: list[str], code: int, text: str, tmp_path: Path
) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "prefixcache.cli", "serve", "--listen", f"{tmp_path}/s", *flags],
        capture_output=True,
        text=True,
        env=environment() | {"COLUMNS": "200"},
        check=False,
    )
    assert told.returncode == code, told.stderr
    assert re.search(text, told.stderr), told.stderr
    assert "Traceback" not in told.stderr


def test_a_file_in_the_place_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("do not touch")
    told = subprocess.run(
        [sys.executable, "-m", "prefixcache.cli", "serve", "--listen", str(precious)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert told.returncode == 2
    assert precious.read_text() == "do not touch"


def test_a_folder_of_another_user_is_refused_by_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = tmp_path.stat().st_uid
    stranger = os.stat_result([0o40700, 0, 0, 0, 4242, 0, 0, 0, 0, 0])
    monkeypatch.setattr(os, "getuid", lambda: owner + 1000)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: stranger)
    with pytest.raises(InvalidRequest, match="belongs to user 4242"):
        prefixcache.connect(f"{tmp_path}/s")
    with pytest.raises(InvalidRequest, match="belongs to user 4242"):
        Listener([f"{tmp_path}/s"]).claim()


def test_the_start_prints_its_arithmetic(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "hidden_size": 576,
                "torch_dtype": "bfloat16",
            }
        )
    )
    with running(f"{tmp_path}/s", "--model", str(tmp_path), "--memory", "2GiB") as service:
        assert service.lines[0] == (
            "23.0 KB per token (30 layers \N{MULTIPLICATION SIGN} 3 kv heads "
            "\N{MULTIPLICATION SIGN} 64, bfloat16) · 2 GiB = 5,825 blocks of 16 = 93,200 tokens"
        )


def test_a_service_answers_exactly_as_the_cache_in_process(sockets: Path) -> None:
    """A seeded walk over all verbs, op by op beside a cache in this process."""
    random = Random(3)
    local = PrefixCache(64, 4)
    me, space = WorkerId("walker"), Namespace("m")
    with (
        running(f"unix:{sockets}/walk.sock", *sizes(64, 4), "--ttl", "30") as service,
        prefixcache.connect(service.target) as client,
        client.attach("m", LAYOUT, name="walker") as session,
    ):
        leases: dict[int, Any] = {}
        with session.acquire(pack([9])) as first:  # tells from which number on its leases count
            local.attach(me, space, first_lease=first.id, now=0.0)
            local.acquire(me, space, pack([9]), now=0.0)
        local.release(me, first.id, now=0.0)

        def both(here: Any, there: Any) -> Any:
            outcomes = []
            for act in (here, there):
                try:
                    outcomes.append(act())
                except CacheError as error:
                    text = "" if isinstance(error, PoolExhausted) else str(error)
                    outcomes.append((type(error), text))
            mine, yours = outcomes
            if isinstance(mine, tuple) and mine and isinstance(mine[0], type):
                assert mine == yours
                return None
            return mine, yours

        def keep(grant: Any, lease: Any) -> None:
            for name in ("block_table", "num_cached", "num_pending", "copies", "ledger", "ttl_s"):
                assert getattr(grant, name) == getattr(lease, name)
            assert grant.lease == lease.id
            leases[lease.id] = lease

        for _ in range(400):
            verb = random.choice(
                ["acquire", "commit", "release"] * 3
                + ["extend", "fork", "truncate", "lookup", "explain"]
            )
            tokens = pack([random.randrange(2) for _ in range(random.randrange(1, 40))])
            number = random.randrange(60)
            if verb == "acquire":
                reserve = random.randrange(8)
                found = both(
                    partial(local.acquire, me, space, tokens, reserve=reserve, now=0.0),
                    partial(session.acquire, tokens, reserve=reserve),
                )
                if found:
                    keep(*found)
                continue
            if verb in ("lookup", "explain"):
                at = {"now": 0.0} if verb == "explain" else {}
                found = both(
                    partial(getattr(local, verb), space, tokens, **at),
                    partial(getattr(session, verb), tokens),
                )
                assert found
                assert found[0] == found[1]
                continue
            if not leases:
                continue
            lease = leases[random.choice(list(leases))]
            new = tokens[: 4 * random.randrange(3)]
            arguments = {"release": (), "fork": (2,), "commit": (number, new)}.get(verb, (number,))
            found = both(
                partial(getattr(local, verb), me, lease.id, *arguments, now=0.0),
                partial(getattr(lease, verb), *arguments),
            )
            if verb == "release":
                del leases[lease.id]
            if found and verb == "fork":
                for grant, child in zip(*found, strict=True):
                    keep(grant, child)
            elif found:
                assert found[0] == found[1]
            local.check()
        here, there = local.snapshot(now=0.0), session.snapshot()
        for name in ("free", "private", "indexed", "ghosts", "nodes", "evicted", "ledger"):
            assert getattr(here, name) == getattr(there, name), name


def test_threads_that_use_no_session_share_one_client(service: ServiceProcess) -> None:
    with prefixcache.connect(service.target) as client:
        seen: list[int] = []
        threads = [
            threading.Thread(target=lambda: seen.append(client.snapshot().num_blocks))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [64] * 8


LARGE_MESSAGES = """
import resource, sys
from prefixcache.service.server import keep_freed_memory

def read_message():
    return len([b"x" * (15 << 20) for _ in range(3)])

def pages_made():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    read_message()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1:]:
    keep_freed_memory()
read_message()
read_message()
print(pages_made())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_what_a_large_message_took_is_kept_for_the_next_one() -> None:
    """New memory is made page by page, while the event loop waits."""

    def pages(*keeps: str) -> int:
        command = [sys.executable, "-c", LARGE_MESSAGES, *keeps]
        return int(subprocess.check_output(command, timeout=PATIENCE_S))

    assert pages("keep") < 1000 < pages()
