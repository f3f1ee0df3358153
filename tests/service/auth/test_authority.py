"""What a client calls itself is for showing: whatever it chooses, it gets no right by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import prefixcache
from prefixcache.client import Client
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import CacheError, NotFound
from prefixcache.service.names import Names
from prefixcache.types import Grant, LeaseId, Namespace, WorkerId, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache.v1.prefixcache_pb2_grpc import PrefixCacheStub
from service.auth.keys import TOKENS, identities
from service.service_process import LAYOUT, ServiceProcess, running, sizes

PROMPT = list(range(1, 9))
SPACE = Namespace("m")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder: Path = tmp_path_factory.mktemp("a")
    flags = ("--identities", str(identities(folder)))
    with running(f"unix:{folder}/s", *sizes(64, 4), *flags) as service:
        yield service


def client(service: ServiceProcess, who: str) -> Client:
    return prefixcache.connect(service.target, token=TOKENS[who])


WISHES = ["", "w1", "w2", "w1~1", "w1#1", "0", "1", "2", "acme", "bolt/w1"]
"""Names of nameless workers, numbers, what might be made of a name that is taken."""


def test_no_name_acts_for_another_worker(service: ServiceProcess) -> None:
    """Whoever is called like somebody else reaches neither its lease nor its blocks."""
    with client(service, "acme") as red, client(service, "bolt") as blue:
        own = [red.attach("tiny", LAYOUT, name=wish) for wish in WISHES]
        theirs = [blue.attach("tiny", LAYOUT, name=wish) for wish in WISHES]
        names = [session.attachment.worker for session in own]
        assert len(set(names)) == len(names), "two of a tenant are called the same"
        assert names[0] == theirs[0].attachment.worker == "w1", "names tell what others have"
        leases = [session.acquire(PROMPT) for session in theirs]
        own_lease = own[0].acquire(PROMPT)
        for session in own[1:]:
            session.close()
        for lease in leases:
            assert lease.commit(len(PROMPT)).num_tokens == len(PROMPT)
            lease.release()
        own_lease.release()
        for session in (own[0], *theirs):
            session.close()


def test_who_sees_several_tenants_sees_the_tenant_beside_the_name(service: ServiceProcess) -> None:
    with (
        client(service, "acme") as red,
        client(service, "bolt") as blue,
        red.attach("tiny", LAYOUT, name="ann"),
        blue.attach("tiny", LAYOUT, name="ann"),
    ):
        assert shown(service, "bolt") == ["ann"]
        assert shown(service, "boss") == ["acme/ann", "bolt/ann"]


def shown(service: ServiceProcess, who: str) -> list[str]:
    """Give the names of attached workers that somebody is shown."""
    with grpc.insecure_channel(service.target) as channel:
        stub: Any = PrefixCacheStub(channel)  # type: ignore[no-untyped-call]
        told = stub.Snapshot(pb.SnapshotRequest(), metadata=bearer(who))
    return sorted(one.worker for one in told.workers if one.state == "attached")


def bearer(who: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKENS[who]}"),)


def test_leases_and_quarantine_belong_to_a_number_whatever_the_names() -> None:
    """Two workers of one name: each has its own leases, and the end of one frees only its own."""
    cache = PrefixCache(8, 4)
    ann, other = WorkerId(1), WorkerId(2)
    for worker in (ann, other):
        cache.attach(worker, SPACE, name="ann", now=0.0)
    lease = cache.acquire(ann, SPACE, pack(PROMPT), now=0.0)
    assert isinstance(lease, Grant)
    for verb in (cache.release, lambda *a, **k: cache.commit(*a, 8, **k)):
        with pytest.raises(CacheError):
            verb(other, lease.lease, now=0.0)
    cache.detach(ann, now=0.0, gone=False)
    assert cache.snapshot(now=0.0).quarantined == 2
    cache.detach(other, now=0.0, gone=True)
    assert cache.worker_gone(other, now=0.0) == 0
    assert cache.snapshot(now=0.0).quarantined == 2
    assert cache.worker_gone(ann, now=0.0) == 2
    with pytest.raises(NotFound):
        cache.release(other, LeaseId(1), now=0.0)


def test_lease_ids_tell_nothing_of_what_others_ask_for() -> None:
    """A worker's leases are numbered in turn, whatever happens between them."""
    cache = PrefixCache(64, 4)
    mine, others = WorkerId(1), WorkerId(2)
    for worker in (mine, others):
        cache.attach(worker, SPACE, now=0.0)
    seen = []
    for n in range(5):
        for k in range(n):
            grant = cache.acquire(others, SPACE, pack([n, k]), now=0.0)
            assert isinstance(grant, Grant)
            cache.release(others, grant.lease, now=0.0)
        grant = cache.acquire(mine, SPACE, pack(PROMPT), now=0.0)
        assert isinstance(grant, Grant)
        seen.append(grant.lease)
        cache.release(mine, grant.lease, now=0.0)
    assert seen == [1, 2, 3, 4, 5]
    assert cache.release(mine, LeaseId(1), now=0.0).num_freed == 0, "again, long after"
    with pytest.raises(NotFound):
        cache.release(mine, LeaseId(6), now=0.0)


def test_names_that_are_taken_cost_no_search() -> None:
    """Ten thousand workers that wish for one name: each number is looked at once."""
    names = Names()
    names.take("", "x~3")
    given = [names.take("", "x") for _ in range(10_000)]
    assert len({*given, "x~3"}) == 10_001
    assert given[:4] == ["x", "x~1", "x~2", "x~4"]
    names.free("", "x")
    assert names.take("", "x") == "x"
    assert names.take("t", "x") == "x", "tenants have names of their own"
