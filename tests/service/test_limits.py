"""Limits are named where they are met, repeated calls are safe, a crowd hurts nobody."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefixcache
from prefixcache.client import Client, codec
from prefixcache.errors import InvalidRequest, NotFound, PoolExhausted
from prefixcache.types import Layout, Namespace, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache_bench.speed import crowd, timing
from service.service_process import LAYOUT, ServiceProcess, running, sizes

CROWD = int(os.environ.get("PREFIXCACHE_CROWD", "1"))
"""`make crowd` sets 10: 1,000 streams and 10,000 leases."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("l")
    flags = ("--max-leases", "4", "--max-namespaces", "3", "--max-pin", "100")
    with running(f"unix:{folder}/l.sock", *sizes(64, 4), *flags) as service:
        yield service


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[Client]:
    with prefixcache.connect(service.target) as client:
        yield client


def attach(client: Client, model: str = "m") -> str:
    request = pb.AttachRequest()
    codec.write_namespace(Namespace(model), request.namespace)
    codec.write_layout(LAYOUT, request.layout)
    key: str = client.call("attach", request).worker_key
    return key


def test_leases_beyond_the_limit_are_refused_by_its_name(client: Client) -> None:
    session = client.attach("m", LAYOUT)
    leases = [session.acquire([n]) for n in range(3)]
    leases[0].commit(1)
    with pytest.raises(
        PoolExhausted, match=r"3 leases are out and 2 more asked for; --max-leases allows 4"
    ):
        leases[0].fork(2)
    leases.append(session.acquire([3]))
    with pytest.raises(PoolExhausted, match="--max-leases") as no:
        session.acquire([9])
    assert no.value.retry_after_s > 0
    for lease in leases:
        lease.release()


def test_namespaces_beyond_the_limit_are_refused_by_its_name(client: Client) -> None:
    for number in range(3):
        client.attach("m" if not number else f"m{number}", LAYOUT)
    with pytest.raises(PoolExhausted, match="3 namespaces are known, --max-namespaces allows no"):
        client.attach("one-too-many", LAYOUT)
    client.attach("m1", LAYOUT)


def test_a_pin_longer_than_the_limit_is_refused_by_its_name(client: Client) -> None:
    for ttl_s in (101.0, 0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(
            InvalidRequest, match=r"up to 100 s \(--max-pin\)|finite number of seconds"
        ):
            client.pin(Namespace("m"), [1], ttl_s=ttl_s)


@pytest.mark.parametrize("number", [-1, 2**31, 2**32, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize(
    ("verb", "message", "field"),
    [
        ("acquire", pb.AcquireRequest, "reserve"),
        ("commit", pb.CommitRequest, "num_tokens"),
        ("extend", pb.ExtendRequest, "num_tokens"),
        ("truncate", pb.TruncateRequest, "num_tokens"),
        ("fork", pb.ForkRequest, "count"),
    ],
)
def test_numbers_at_their_edges_are_refused_and_change_nothing(
    client: Client, verb: str, message: Any, field: str, number: int
) -> None:
    key = attach(client)
    tokens = pack([1, 2, 3])
    lease = client.call("acquire", pb.AcquireRequest(worker_key=key, tokens=tokens)).grant.lease
    client.call("commit", pb.CommitRequest(worker_key=key, lease=lease, num_tokens=2))
    before = client.snapshot()
    request = message(worker_key=key)
    setattr(request, field, number)
    if verb == "acquire":
        request.tokens = tokens
    else:
        request.lease = lease
    with pytest.raises((InvalidRequest, PoolExhausted)):
        client.call(verb, request)
    after = client.snapshot()
    assert (after.free, after.private, after.indexed) == (
        before.free,
        before.private,
        before.indexed,
    )
    client.call("detach", pb.DetachRequest(worker_key=key))


def test_a_repeated_call_gets_the_same_answer_and_does_nothing_again(client: Client) -> None:
    key = attach(client)
    tokens = pack(range(8))
    call = client.call
    lease = call("acquire", pb.AcquireRequest(worker_key=key, tokens=tokens)).grant.lease
    repeated: list[tuple[str, Any]] = [
        ("commit", pb.CommitRequest(num_tokens=8)),
        ("extend", pb.ExtendRequest(num_tokens=13)),
        ("commit", pb.CommitRequest(num_tokens=9, new_tokens=pack([77]))),
        ("truncate", pb.TruncateRequest(num_tokens=6)),
        ("fork", pb.ForkRequest(count=1)),
    ]
    for number, (verb, request) in enumerate(repeated):
        request.worker_key, request.lease = key, lease
        request.request_id = f"r{number}"
        first = call(verb, request)
        between = client.snapshot()
        assert call(verb, request) == first
        after = client.snapshot()
        assert (after.free, len(after.leases)) == (between.free, len(between.leases))
        assert [one.num_tokens for one in after.leases] == [
            one.num_tokens for one in between.leases
        ]
    call("detach", pb.DetachRequest(worker_key=key))


def test_one_large_message_of_snapshots_is_cut_short(client: Client) -> None:
    session = client.attach("m", LAYOUT)
    with session.batch() as step:
        replies = [step.snapshot() for _ in range(50)]
    told = [reply.error for reply in replies]
    assert told[0] is None
    assert isinstance(told[1], InvalidRequest)
    assert "1 snapshot in 64 ops" in str(told[1])


@pytest.mark.parametrize("char", ["m", "ü", "漢", "\U0001d11e"])
def test_an_error_that_repeats_a_long_name_is_told_and_not_the_transport_s(
    client: Client, char: str
) -> None:
    with pytest.raises(NotFound, match="no recent request"):
        client.recount(char * 1024)


def test_who_is_refused_does_not_settle_the_layout_for_all(tmp_path: Path) -> None:
    with (
        running(f"unix:{tmp_path}/l.sock", "--memory", "1MiB", "--block-size", "4") as service,
        prefixcache.connect(service.target) as client,
    ):
        with pytest.raises(InvalidRequest, match="a worker's name has up to 128 characters"):
            client.attach("m", Layout(9, 1, 4, "float32"), name="n" * 300)
        client.attach("m", LAYOUT)


def test_a_crowd_of_streams_and_leases_leaves_nothing_behind() -> None:
    seen = asyncio.run(crowd.measure(100 * CROWD, 1000 * CROWD, 2 * CROWD, 60))
    assert (seen.leases_left, seen.blocks_lost) == (0, 0)
    # Per idle stream and ten leases well under a MiB; nothing piles up for who does not read.
    assert seen.mib_peak - seen.mib_before < 60 + 100 * CROWD


def test_a_stranger_cannot_tell_from_timing_what_is_cached() -> None:
    found = timing.measure(400 * CROWD)
    # 400 probes scatter by 0.03; the promise itself is measured over 2,000 by the command.
    slack = 0.05 if CROWD == 1 else 0.0
    for asker in ("another tenant", "another salt"):
        assert timing.LOWEST - slack <= found[asker] <= timing.HIGHEST + slack, found


def test_the_same_salt_shares_and_another_does_not(tmp_path: Path) -> None:
    with (
        running(f"unix:{tmp_path}/s.sock", *sizes(64, 4)) as service,
        prefixcache.connect(service.target) as client,
    ):
        with client.attach("m", LAYOUT, salt="a").acquire(list(range(9))) as lease:
            lease.commit(9)
        same = client.attach("m", LAYOUT, salt="a").acquire(list(range(9)))
        other = client.attach("m", LAYOUT, salt="b").acquire(list(range(9)))
        assert (same.ledger.reused, other.ledger.reused) == (8, 0)
