"""Who may: the tenant comes from the identity, and what is foreign is not found."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import Client
from prefixcache.client.address import this_host
from prefixcache.client.codec import write_layout, write_namespace
from prefixcache.errors import InvalidRequest, NotFound, PermissionDenied, Unauthenticated
from prefixcache.service.auth import identity as module
from prefixcache.service.auth.identity import Identities, Identity, Proof
from prefixcache.service.verbs.workers import MOST_FINISHED
from prefixcache.types import Namespace, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache.v1.prefixcache_pb2_grpc import PrefixCacheStub
from service.auth.keys import TOKENS, identities
from service.service_process import LAYOUT, ServiceProcess, eventually, running, sizes

PROMPT = list(range(12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("i")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[ServiceProcess]:
    own = f'\n[[identity]]\nname = "door"\ntenant = "acme"\nsocket = "{folder}/acme.sock"\n'
    flags = ("--identities", str(identities(folder, own)), "--ttl", "5")
    with running(f"unix:{folder}/front.sock", *sizes(64, 4), *flags) as service:
        yield service


@pytest.fixture
def acme(service: ServiceProcess) -> Iterator[Client]:
    with prefixcache.connect(f"{front(service)}", token=TOKENS["acme"]) as client:
        yield client


@pytest.fixture
def bolt(service: ServiceProcess) -> Iterator[Client]:
    with prefixcache.connect(front(service), token=TOKENS["bolt"]) as client:
        yield client


@pytest.fixture
def boss(service: ServiceProcess) -> Iterator[Client]:
    with prefixcache.connect(front(service), token=TOKENS["boss"]) as client:
        yield client
        for namespace in client.snapshot().namespaces:
            client.reset(namespace)


def front(service: ServiceProcess) -> str:
    return service.target.partition(",")[0]


def store(client: Client, tokens: list[int] = PROMPT, **more: str) -> None:
    with client.attach("tiny", LAYOUT, **more) as session, session.acquire(tokens) as lease:  # type: ignore[arg-type]
        lease.commit(len(tokens))


def test_the_tenant_comes_from_the_identity(acme: Client, bolt: Client, boss: Client) -> None:
    store(acme)
    [namespace] = acme.snapshot().namespaces
    assert namespace == Namespace("tiny", tenant="acme")
    store(acme, tenant="acme")  # naming one's own is allowed, and means the same
    assert len(acme.snapshot().namespaces) == 1


def test_naming_another_tenant_is_not_found_with_every_verb(
    acme: Client, bolt: Client, boss: Client
) -> None:
    store(acme)
    foreign = Namespace("tiny", tenant="acme")
    calls: list[Any] = [
        lambda: bolt.attach("tiny", LAYOUT, tenant="acme"),
        lambda: bolt.lookup(foreign, PROMPT),
        lambda: bolt.explain(foreign, PROMPT),
        lambda: bolt.reset(foreign),
        lambda: bolt.pin(foreign, PROMPT, ttl_s=9.0),
        lambda: bolt.unpin(foreign),
        lambda: bolt.quota(foreign),
        lambda: bolt.quota("acme"),
        lambda: bolt.outline(foreign),
    ]
    for call in calls:
        with pytest.raises(NotFound):
            call()
    with bolt.attach("tiny", LAYOUT) as session, session.batch() as batch:
        reply = batch.acquire(PROMPT)
        write_namespace(foreign, batch.step.message.ops[0].acquire.namespace)
    assert isinstance(reply.error, NotFound)
    assert acme.lookup(Namespace("tiny"), PROMPT).num_hit == 8  # nothing was reset


def test_what_nobody_has_named_is_reset_by_who_may_name_all_of_it(
    service: ServiceProcess, acme: Client, bolt: Client, boss: Client
) -> None:
    store(acme)
    assert boss.reset_unnamed().num_blocks == 0
    assert acme.lookup(Namespace("tiny"), PROMPT).num_hit == 8, "it has a name"
    with pytest.raises(PermissionDenied, match="name each namespace"):
        bolt.reset_unnamed()
    with bolt.attach("tiny", LAYOUT) as session, session.batch() as batch:
        reply = batch.reset()
        batch.step.message.ops[0].reset.unnamed = True
    assert isinstance(reply.error, PermissionDenied)


def test_a_tenant_finds_nothing_of_another_under_the_same_name(
    acme: Client, bolt: Client, boss: Client
) -> None:
    store(acme)
    assert bolt.lookup(Namespace("tiny"), PROMPT).num_hit == 0
    told = bolt.explain(Namespace("tiny"), PROMPT)
    assert (told.ledger.cold, told.parted_at, told.num_parted) == (12, None, 0)
    with bolt.attach("tiny", LAYOUT) as session:
        assert session.acquire(PROMPT).ledger.cold == 12


def test_only_an_admin_sees_what_others_have(acme: Client, bolt: Client, boss: Client) -> None:
    store(acme)
    session = acme.attach("tiny", LAYOUT, name="a-worker")
    lease = session.acquire(PROMPT)
    acme.pin(Namespace("tiny"), PROMPT, ttl_s=60.0)
    boss.set_quota("acme", max_held=60)
    mine, all_of_it, none = acme.snapshot(), boss.snapshot(), bolt.snapshot()
    assert [one.lease for one in mine.leases] == [one.lease for one in all_of_it.leases]
    assert mine.pins == pytest.approx(mine.pins)
    assert len(mine.pins) == len(all_of_it.pins) == 1
    assert [one.tenant for one in mine.quotas] == ["acme"]
    assert (none.leases, none.pins, none.quotas) == ((), (), ())
    assert {one.tenant for one in none.namespaces} <= {"bolt"}
    shown = {
        *("num_blocks", "block_size", "free", "private", "indexed", "quarantined", "evictable"),
        *("max_pinned", "num_leases", "num_namespaces", "ledger"),
    }
    assert not any(value for name, value in none.fields().items() if name not in shown)
    assert (none.num_leases, none.num_namespaces) == (0, len(none.namespaces))
    assert none.ledger.total == sum(one.total for one in none.namespaces.values())
    message = bolt.call("snapshot", pb.SnapshotRequest())
    assert b"a-worker" not in message.SerializeToString()
    assert "a-worker" in str(boss.call("snapshot", pb.SnapshotRequest()).workers)
    assert not bolt.outline().namespaces
    assert len(boss.outline().namespaces) == len(acme.outline().namespaces) == 1
    boss.set_quota("acme", max_held=None)
    lease.release()


def test_a_model_that_is_not_allowed_is_not_found(acme: Client) -> None:
    with pytest.raises(NotFound):
        acme.attach("large", LAYOUT)
    with pytest.raises(NotFound):
        acme.lookup(Namespace("large"), PROMPT)


def test_only_an_admin_sets_quotas(acme: Client, boss: Client) -> None:
    with pytest.raises(PermissionDenied, match="acme-serving may not set quotas"):
        acme.set_quota(Namespace("tiny"), max_held=None)
    assert acme.quota("acme").max_held is None


@pytest.mark.parametrize("token", ["", "wrong", "secret-of-acm", "secret-of-acmee"])
def test_who_proves_nothing_is_nobody(service: ServiceProcess, token: str) -> None:
    with prefixcache.connect(front(service), token=token) as client:
        for call in (client.snapshot, lambda: client.attach("tiny", LAYOUT)):
            with pytest.raises(Unauthenticated) as no:
                call()
            assert "acme" not in str(no.value)


def test_a_worker_key_is_of_no_use_to_another_identity(
    service: ServiceProcess, acme: Client, bolt: Client
) -> None:
    request = pb.AttachRequest()
    request.namespace.model = "tiny"
    from prefixcache.client import codec

    codec.write_layout(LAYOUT, request.layout)
    key = acme.call("attach", request).worker_key
    grant = acme.call("acquire", pb.AcquireRequest(worker_key=key, tokens=pack(PROMPT))).grant
    stolen: list[tuple[str, Any]] = [
        ("release", pb.ReleaseRequest(worker_key=key, lease=grant.lease)),
        ("commit", pb.CommitRequest(worker_key=key, lease=grant.lease, num_tokens=12)),
        ("lookup", pb.LookupRequest(worker_key=key, tokens=pack(PROMPT))),
        ("detach", pb.DetachRequest(worker_key=key)),
        ("attach", pb.AttachRequest(worker_key=key, layout=request.layout)),
    ]
    for verb, message in stolen:
        with pytest.raises(NotFound):
            bolt.call(verb, message)
    acme.call("detach", pb.DetachRequest(worker_key=key))


def test_a_lost_worker_s_key_ends_its_quarantine_for_its_own_identity_alone(
    acme: Client, bolt: Client, boss: Client
) -> None:
    """Its process may still be writing: the word of whoever else has the key counts for nothing."""
    before = boss.snapshot().quarantined
    first = pb.AttachRequest(
        namespace=pb.Namespace(model="tiny"), pid=os.getpid(), host=this_host()
    )
    write_layout(LAYOUT, first.layout)
    acquire = pb.AcquireRequest(tokens=pack([7000, 7001, 7002, 7003]))
    batch = pb.OpBatch(ops=[pb.Op(id=1, attach=first), pb.Op(id=2, acquire=acquire)])
    more = threading.Event()
    stub: Any = PrefixCacheStub(acme.channel)  # type: ignore[no-untyped-call]
    call = stub.Session(
        itertools.chain([batch], (batch for _ in iter(more.wait, True))),
        metadata=(("authorization", f"Bearer {TOKENS['acme']}"),),
    )
    key = next(call).results[0].attach.worker_key
    call.cancel()
    more.set()
    eventually(lambda: boss.snapshot().quarantined > before)
    held = boss.snapshot().quarantined
    request = pb.AttachRequest(namespace=pb.Namespace(model="tiny"), finished=[key])
    write_layout(LAYOUT, request.layout)
    for stranger in (bolt, boss):
        own = stranger.call("attach", request).worker_key
        stranger.call("detach", pb.DetachRequest(worker_key=own))
        assert boss.snapshot().quarantined == held
    acme.call("detach", pb.DetachRequest(worker_key=acme.call("attach", request).worker_key))
    assert boss.snapshot().quarantined == before
    request.finished[:] = [key] * (MOST_FINISHED + 1)
    with pytest.raises(InvalidRequest, match="1,025 lost workers; up to 1,024"):
        acme.call("attach", request)


def test_a_lease_of_another_tenant_is_not_found(acme: Client, bolt: Client, boss: Client) -> None:
    lease = acme.attach("tiny", LAYOUT).acquire(PROMPT)
    thief = bolt.attach("tiny", LAYOUT).acquire([77])
    thief.id = lease.id
    for call in (lambda: thief.commit(1), lambda: thief.extend(9), lambda: thief.fork(1)):
        with pytest.raises(NotFound, match=f"no lease {lease.id} "):
            call()
    lease.release()


def test_a_socket_of_its_own_is_an_identity_and_only_its_user_s(
    service: ServiceProcess, folder: Path, boss: Client
) -> None:
    path = folder / "acme.sock"
    status = path.stat()
    assert (status.st_mode & 0o777, status.st_uid) == (0o600, os.getuid())
    with prefixcache.connect(f"unix:{path}", token=TOKENS["boss"]) as client:
        store(client)  # the socket says who it is, whatever token comes with the call
        assert list(client.snapshot().namespaces) == [Namespace("tiny", tenant="acme")]
        with pytest.raises(NotFound):
            client.lookup(Namespace("tiny", tenant="bolt"), PROMPT)


def test_identities_are_read_again_when_the_file_changes(
    service: ServiceProcess, folder: Path, boss: Client
) -> None:
    path = folder / "identities.toml"
    before = path.read_text()
    with prefixcache.connect(front(service), token="new-secret") as client:
        with pytest.raises(Unauthenticated):
            client.snapshot()
        from hashlib import sha256

        digest = sha256(b"new-secret").hexdigest()
        path.write_text(
            before + f'[[identity]]\nname = "new"\ntenant = "new"\ntoken_sha256 = "{digest}"\n'
        )

        def known() -> bool:
            try:
                client.snapshot()
            except Unauthenticated:
                return False
            return True

        eventually(known)
        path.write_text("not [ toml")  # a broken file changes nothing
        eventually(lambda: known() and "identities are as before" in service.log())
        assert known()
        path.write_text(before)
        eventually(lambda: not known())


def test_every_digest_is_compared_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Identities(identities(tmp_path))
    compared: list[tuple[bytes, bytes]] = []
    real = module.hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(module.hmac, "compare_digest", counting)
    for token in ("", "wrong", TOKENS["acme"], TOKENS["boss"]):
        compared.clear()
        identity = found.of(Proof.by_token(token))
        assert len(compared) == 3  # all of them, also after one that fits
        assert (identity is not None) == (token in TOKENS.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no"),
        ("[[identity]]", "needs a name"),
        ('[[identity]]\nname = "a"', "needs a tenant, or admin"),
        ('[[identity]]\nname = "a"\ntenant = "t"', "can prove itself by nothing"),
        ('[[identity]]\nname = "a"\ntenant = "t"\ntoken = "x"', "has 'token'; there are"),
        ('[[identity]]\nname = "a"\ntenant = "t"\ntoken_sha256 = "abc"', "64 hexadecimal"),
        ('[[identity]]\nname = "a"\ntenant = "t"\nuid = 7\ncertificates = "c"', "name a socket"),
        ('[[identity]]\nname = "a"\nadmin = "yes"', "true or false"),
        ('[[identities]]\nname = "a"', "unknown table 'identities'"),
        ("[[identity", "is no TOML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_place(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "who.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        Identities(path)


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    path = identities(tmp_path)
    path.chmod(0o622)
    with pytest.raises(InvalidRequest, match="chmod go-w"):
        Identities(path)


def test_an_admin_may_name_any_tenant_and_others_only_theirs() -> None:
    boss, acme = Identity("boss", admin=True), Identity("a", "acme", ("tiny*",))
    assert boss.own(Namespace("m", tenant="bolt")).tenant == "bolt"
    assert acme.own(Namespace("tiny-1", salt="s")) == Namespace("tiny-1", tenant="acme", salt="s")
    assert not acme.sees(Namespace("tiny", tenant="bolt"))


def test_garbage_in_the_authorization_is_unauthenticated(service: ServiceProcess) -> None:
    path = "/prefixcache.v1.PrefixCache/Snapshot"
    with grpc.insecure_channel(front(service)) as channel:
        call = channel.unary_unary(path)
        for value in ("Basic abc", "Bearer", "Bearer " + "x" * 5000):
            with pytest.raises(grpc.RpcError) as no:
                call(b"", metadata=(("authorization", value),), timeout=PATIENCE_S)
            assert no.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_watcher_proves_who_it_is(acme: Client) -> None:
    store(acme)
    assert next(iter(acme.watch())).is_snapshot


def test_every_view_is_of_the_models_that_an_identity_may_use(tmp_path: Path) -> None:
    more = (
        f'\n[[identity]]\nname = "other"\ntenant = "acme"\nmodels = ["secret*"]\n'
        f'socket = "{tmp_path}/own.sock"\n'
    )
    flags = ("--identities", str(identities(tmp_path, more)), "--watch-tokens")
    with (
        running(f"unix:{tmp_path}/s.sock", *sizes(64, 4), *flags) as service,
        prefixcache.connect(f"{tmp_path}/own.sock") as other,
        prefixcache.connect(front(service), token=TOKENS["acme"]) as acme,
        other.attach("secret-model", LAYOUT, name="hidden") as session,
    ):
        with session.acquire(PROMPT, request_id="rq") as lease:
            lease.commit(len(PROMPT))
        assert other.recount("rq").past is not None
        seen = str(acme.call("snapshot", pb.SnapshotRequest()))
        assert "secret" not in seen
        assert "hidden" not in seen
        assert acme.outline().namespaces == ()
        with pytest.raises(NotFound):
            acme.recount("rq")
        store(acme)
        heard = next(batch for batch in acme.watch(tokens=True) if batch.events)
        assert {event.namespace.model for event in heard.events} == {"tiny"}


def test_a_salt_is_shown_to_nobody_nor_are_the_tokens_behind_it(
    acme: Client, boss: Client, service: ServiceProcess
) -> None:
    salt = "pepper-of-user-17"
    with acme.attach("tiny", LAYOUT, salt=salt) as session:
        with session.acquire(PROMPT) as lease:
            lease.commit(len(PROMPT))
        acme.pin(Namespace("tiny", salt=salt), PROMPT, ttl_s=60.0)
        held = session.acquire([7] * 12)
        for client in (acme, boss):
            answers = [
                client.call("snapshot", pb.SnapshotRequest()),
                client.call("tree", pb.TreeRequest()),
            ]
            assert all(salt not in str(answer) for answer in answers)
            assert not any(
                branch.tokens
                for tree in answers[1].namespaces
                if tree.namespace.salt
                for branch in tree.branches
            )
        named = Namespace("tiny", tenant="acme", salt=salt)
        assert any(branch.tokens for branch in acme.outline(named).namespaces[0].branches)
        held.release()
    [shown] = [one for one in boss.snapshot().namespaces if one.salt]
    assert boss.reset(shown).num_blocks == 3  # an operator can steer what it cannot read
    assert salt not in service.log()
