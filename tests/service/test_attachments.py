"""A salt for each user, or each request, from one worker that lives for months."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import Client, codec
from prefixcache.errors import InvalidRequest
from prefixcache.service.attachments import MAX_ATTACHED
from prefixcache.types import Namespace, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache.v1.prefixcache_pb2_grpc import PrefixCacheStub
from service.service_process import LAYOUT, ServiceProcess, running, sizes

PROMPT = list(range(10))


@pytest.fixture(scope="module")
def service(sockets: Path) -> Iterator[ServiceProcess]:
    flags = ("--ttl", "600", "--max-namespaces", str(MAX_ATTACHED + 40))
    with running(f"unix:{sockets}/salts.sock", *sizes(64, 4), *flags) as process:
        yield process


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[Client]:
    with prefixcache.connect(service.target) as client:
        yield client


@pytest.fixture
def stub(service: ServiceProcess) -> Iterator[Any]:
    with grpc.insecure_channel(service.target) as channel:
        yield PrefixCacheStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture
def key(stub: Any) -> Iterator[str]:
    key = attach(stub, "first").worker_key
    yield key
    stub.Detach(pb.DetachRequest(worker_key=key))


def attach(stub: Any, salt: object, key: str = "") -> pb.AttachResponse:
    request = pb.AttachRequest(worker_key=key)
    codec.write_namespace(Namespace("m", salt=str(salt)), request.namespace)
    codec.write_layout(LAYOUT, request.layout)
    answer: pb.AttachResponse = stub.Attach(request)
    return answer


def by_name(key: str, salt: str, **fields: Any) -> pb.AcquireRequest:
    """An acquire behind a salt that need not be attached."""
    request = pb.AcquireRequest(worker_key=key, tokens=pack(PROMPT), **fields)
    codec.write_namespace(Namespace("m", salt=salt), request.namespace)
    return request


def not_found(call: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    return str(caught.value.details())


def test_a_worker_attaches_one_after_another_and_leaves_those_it_does_not_use(
    stub: Any, key: str, client: Client
) -> None:
    tokens = pack(PROMPT)
    lease = stub.Acquire(pb.AcquireRequest(worker_key=key, tokens=tokens)).grant.lease
    for number in range(1, MAX_ATTACHED + 200):
        assert attach(stub, f"late {number}", key).namespace_index == number
        if number % 50 == 0:  # what is used stays
            stub.Lookup(pb.LookupRequest(worker_key=key, namespace_index=1, tokens=tokens))
    why = not_found(lambda: stub.Acquire(pb.AcquireRequest(worker_key=key, tokens=tokens)))
    assert why == (
        f"the namespace at index 0 was left: of {MAX_ATTACHED + 200} attached ones the "
        f"{MAX_ATTACHED} that were used last are kept. Attach it again, or name it in the request."
    )
    assert not_found(
        lambda: stub.Acquire(pb.AcquireRequest(worker_key=key, namespace_index=9999, tokens=tokens))
    ).endswith("there is none at index 9999")
    stub.Acquire(pb.AcquireRequest(worker_key=key, namespace_index=1, tokens=tokens))
    # Its lease went on where it has left, and what it stored is found.
    stub.Commit(pb.CommitRequest(worker_key=key, lease=lease, num_tokens=10))
    stub.Release(pb.ReleaseRequest(worker_key=key, lease=lease))
    assert client.lookup(Namespace("m", salt="first"), PROMPT).num_hit == 8
    assert attach(stub, "first", key).namespace_index == MAX_ATTACHED + 200


def test_who_waits_where_his_worker_has_left_is_served(client: Client) -> None:
    def request(salt: object) -> pb.AttachRequest:
        return client.attach_request(Namespace("w", salt=str(salt)), LAYOUT, None, "")

    with client.attach("w", LAYOUT) as owner, client.attach("w", LAYOUT) as session:
        lease = owner.acquire(PROMPT)
        future = session.acquire_later(PROMPT, wait_s=60.0)
        with session.batch() as batch:
            for number in range(MAX_ATTACHED + 5):
                batch.step.attach(request(number))
        assert not future.done()
        lease.commit(10)
        assert future.result(PATIENCE_S).ledger.joined == 8


def test_an_acquire_may_name_its_namespace(stub: Any, key: str, client: Client) -> None:
    """More salts than may be attached, or even be there, from one worker that attaches none."""
    for number in range(MAX_ATTACHED + 100):
        grant = stub.Acquire(by_name(key, f"own {number}")).grant
        assert grant.num_cached == 0
        if number % 40 == 0:
            again = stub.Acquire(by_name(key, f"own {number}", request_id="r")).grant
            assert stub.Acquire(by_name(key, f"own {number}", request_id="r")).grant == again
            stub.Release(pb.ReleaseRequest(worker_key=key, lease=again.lease))
        stub.Commit(pb.CommitRequest(worker_key=key, lease=grant.lease, num_tokens=10))
        stub.Release(pb.ReleaseRequest(worker_key=key, lease=grant.lease))
    last = f"own {MAX_ATTACHED + 99}"
    grant = stub.Acquire(by_name(key, last)).grant
    assert grant.num_cached == 9  # the same salt shares
    stub.Release(pb.ReleaseRequest(worker_key=key, lease=grant.lease))
    assert attach(stub, "another", key).namespace_index == 1, "none of them was attached"
    client.check()


def test_one_session_of_the_client_uses_as_many_salts_as_it_likes(client: Client) -> None:
    with client.attach("c", LAYOUT, salt="own") as session:
        for number in range(MAX_ATTACHED + 100):
            with session.acquire(PROMPT, salt=f"user {number}") as lease:
                assert lease.num_cached == 0
                lease.commit(10)
        future = session.acquire_later(PROMPT, salt=f"user {MAX_ATTACHED + 99}")
        assert future.result(PATIENCE_S).num_cached == 9
        assert session.acquire(PROMPT, salt="").num_cached == 0
        assert session.lookup(PROMPT).num_hit == 0, "the session's own salt is another one"


def test_no_salt_is_sent_to_a_service_that_would_not_see_it(client: Client) -> None:
    """Else requests that are to be kept apart would share."""
    with client.attach("c", LAYOUT) as session:
        session._acquires_by_name = False  # as one of an earlier version answers
        with pytest.raises(InvalidRequest, match="this service takes no salt and no adapter"):
            session.acquire(PROMPT, salt="a")
        session._reuses_as_asked = False
        for terms in ({"reuse": False}, {"min_partial": 2}):
            with pytest.raises(InvalidRequest, match="is not told how much to reuse"):
                session.acquire(PROMPT, **terms)


def test_what_is_leased_by_name_stays_while_the_lease_does(
    stub: Any, key: str, client: Client
) -> None:
    lease = stub.Acquire(by_name(key, "held")).grant.lease
    for number in range(400):
        stub.Release(
            pb.ReleaseRequest(
                worker_key=key, lease=stub.Acquire(by_name(key, f"other {number}")).grant.lease
            )
        )
    stub.Commit(pb.CommitRequest(worker_key=key, lease=lease, num_tokens=10))
    assert client.lookup(Namespace("m", salt="held"), PROMPT).num_hit == 8
    stub.Release(pb.ReleaseRequest(worker_key=key, lease=lease))


def test_a_name_without_a_model_is_refused(stub: Any, key: str) -> None:
    request = pb.AcquireRequest(worker_key=key, tokens=pack(PROMPT))
    request.namespace.salt = "alone"
    with pytest.raises(grpc.RpcError, match="a namespace needs the name of a model"):
        stub.Acquire(request)
