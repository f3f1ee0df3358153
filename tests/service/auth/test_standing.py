"""Who is taken out of the file of identities, or changed in it, is out of what he has open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import unary
from prefixcache.client.codec import write_layout
from prefixcache.errors import CacheError, NotFound, Unauthenticated
from prefixcache.service.auth import authenticator as module
from prefixcache.service.auth.admission import Admission, Places
from prefixcache.service.auth.authenticator import Authenticator, IdentityFile
from prefixcache.service.auth.connections import Connections
from prefixcache.service.auth.standing import OpenCalls, Standing
from prefixcache.types import pack
from prefixcache.v1 import prefixcache_pb2 as pb
from service.auth.keys import TOKENS, digest, identities
from service.service_process import LAYOUT, ServiceProcess, eventually, running, sizes

PROMPT = list(range(12))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    own = f'\n[[identity]]\nname = "door"\ntenant = "acme"\nsocket = "{tmp_path}/own.sock"\n'
    flags = ("--identities", str(identities(tmp_path, own)), "--ttl", "60")
    with running(f"unix:{tmp_path}/s.sock", *sizes(64, 4), *flags) as service:
        yield service


def edit(folder: Path, change: Callable[[str], str]) -> None:
    """Write another file of identities, as a careful operator does: whole, then in its place."""
    path, new = folder / "identities.toml", folder / "new.toml"
    before = path.read_text()
    after = change(before)
    assert after != before
    new.write_text(after)
    new.chmod(0o600)
    new.replace(path)


def without(name: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        tables = text.split("[[identity]]")
        return "[[identity]]".join(one for one in tables if f'name = "{name}"' not in one)

    return change


CHANGES: dict[str, Callable[[str], str]] = {
    "taken out": without("acme-serving"),
    "token replaced": lambda text: text.replace(digest("acme"), digest("acme")[::-1]),
    "models narrowed": lambda text: text.replace('["tiny*"]', '["other"]', 1),
    "tenant changed": lambda text: text.replace('tenant = "acme"', 'tenant = "elsewhere"', 1),
}


class Caller:
    """Somebody with a session, a watch, a unary worker and a call that waits."""

    def __init__(self, target: str, token: str | None) -> None:
        self.client = prefixcache.connect(target, token=token)
        self.session = self.client.attach("tiny", LAYOUT)
        self.lease = self.session.acquire(PROMPT)
        self.metadata = None if token is None else (("authorization", f"Bearer {token}"),)
        stream: Any = self.client.channel.unary_stream(
            unary.WATCH_PATH, pb.WatchRequest.SerializeToString, pb.WatchResponse.FromString
        )
        self.watch = stream(pb.WatchRequest(), metadata=self.metadata)
        next(self.watch)
        request = pb.AttachRequest(namespace=pb.Namespace(model="tiny"), name="unary")
        write_layout(LAYOUT, request.layout)
        self.key = self.client.call("attach", request).worker_key
        self.client.call("acquire", pb.AcquireRequest(worker_key=self.key, tokens=pack(PROMPT)))
        rpc = unary.RPCS["acquire"]
        method: Any = self.client.channel.unary_unary(
            rpc.path, rpc.request.SerializeToString, rpc.response.FromString
        )
        large = pb.AcquireRequest(worker_key=self.key, tokens=pack(range(240)), wait_s=50.0)
        self.waiting = method.future(large, metadata=self.metadata, timeout=PATIENCE_S)

    def is_out(self) -> bool:
        """Whether nothing of it is open any more."""
        return not self.session.alive and not self.watch.is_active() and self.waiting.done()

    def close(self) -> None:
        self.watch.cancel()
        self.waiting.cancel()
        self.session.close()
        self.client.close()


@pytest.mark.parametrize("change", CHANGES)
def test_who_is_changed_is_out_of_all_that_he_has_open(
    service: ServiceProcess, tmp_path: Path, change: str
) -> None:
    target = service.target.partition(",")[0]
    red, blue = Caller(target, TOKENS["acme"]), Caller(target, TOKENS["bolt"])
    boss = prefixcache.connect(target, token=TOKENS["boss"])
    eventually(lambda: boss.snapshot().waiting == 2)
    edit(tmp_path, CHANGES[change])
    eventually(red.is_out)
    for call in (red.watch, red.waiting):
        assert call.code() is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(CacheError):
        red.lease.commit(len(PROMPT))
    # The patrol ends the calls, and in the same round the workers that have none open.
    eventually(lambda: all(one.namespace.tenant != "acme" for one in boss.snapshot().leases))
    left = boss.snapshot()
    held = [one.namespace.tenant for one in left.leases]
    assert held.count("acme") == 0
    assert held.count("bolt") == 2
    # As of a lost worker: its process lives, and may still be writing.
    assert left.quarantined > 0
    blue.lease.commit(len(PROMPT))
    assert not blue.is_out()
    assert blue.watch.is_active()
    assert not blue.waiting.done()
    for one in (red, blue, boss):
        one.close()


def test_who_has_a_socket_of_his_own_is_out_with_it(
    service: ServiceProcess, tmp_path: Path
) -> None:
    red = Caller(f"unix:{tmp_path}/own.sock", None)
    edit(tmp_path, without("door"))
    eventually(red.is_out)
    assert red.watch.code() is grpc.StatusCode.UNAUTHENTICATED
    red.close()


def attach(target: str, token: str | None) -> tuple[prefixcache.Client, str]:
    """Let a worker without a stream in; give its client and its key."""
    client = prefixcache.connect(target, token=token)
    request = pb.AttachRequest(namespace=pb.Namespace(model="tiny"), name="unary")
    write_layout(LAYOUT, request.layout)
    return client, client.call("attach", request).worker_key


def renew(client: prefixcache.Client, key: str) -> None:
    client.call("renew", pb.RenewRequest(worker_key=key))


def test_a_worker_without_a_stream_goes_with_what_it_showed_last(
    service: ServiceProcess, tmp_path: Path
) -> None:
    """However its identity goes on: another token, or a socket that it no longer has."""
    target = service.target.partition(",")[0]
    new = "another-secret"
    both = f'token_sha256 = ["{digest("acme")}", "{sha256(new.encode()).hexdigest()}"]'
    old_way, other_way = attach(target, TOKENS["acme"]), attach(target, TOKENS["acme"])
    by_socket = attach(f"unix:{tmp_path}/own.sock", None)
    edit(tmp_path, lambda text: text.replace(f'token_sha256 = "{digest("acme")}"', both))
    moved = prefixcache.connect(target, token=new)
    eventually(lambda: service.log().count("identities read again") == 1)
    renew(moved, other_way[1])  # the same worker: its process has read the new token
    renew(*old_way)
    edit(
        tmp_path,
        lambda text: text.replace(f'"{digest("acme")}", ', "").replace(
            f'socket = "{tmp_path}/own.sock"', f'token_sha256 = "{digest("bolt")[::-1]}"'
        ),
    )
    eventually(lambda: service.log().count("worker left") == 2)
    renew(moved, other_way[1])
    for key in (old_way[1], by_socket[1]):
        with pytest.raises(NotFound):
            renew(moved, key)
    for client in (old_way[0], other_way[0], by_socket[0], moved):
        client.close()


def test_a_file_that_is_wrong_ends_nobody(service: ServiceProcess, tmp_path: Path) -> None:
    red = Caller(service.target.partition(",")[0], TOKENS["acme"])
    edit(tmp_path, lambda text: text + "[[identity]]\n")
    eventually(lambda: "identities are as before" in service.log())
    red.lease.commit(len(PROMPT))
    assert red.session.alive
    assert red.watch.is_active()
    red.close()


class Proof:
    """What a call brings: a client certificate with a name in it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_common_name": [self._name.encode()]}

    def invocation_metadata(self) -> tuple[()]:
        return ()


def test_certificates_stand_no_longer_than_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a message is refused as soon as the file is read, before the patrol comes round."""
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)
    more = '[[identity]]\nname = "c"\ntenant = "acme"\ncertificates = ["c.acme"]\n'
    identity_file = IdentityFile(identities(tmp_path, more))
    standing = Standing(Authenticator(identity_file), Proof("c.acme"))
    standing.check()
    edit(tmp_path, lambda text: text.replace("c.acme", "d.acme"))
    assert identity_file.current is not None
    with pytest.raises(Unauthenticated, match=r"c\.acme"):
        standing.check()


def test_a_proof_is_looked_at_again_only_if_the_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)
    more = '[[identity]]\nname = "c"\ntenant = "acme"\ncertificates = ["c.acme"]\n'
    identity_file = IdentityFile(identities(tmp_path, more))
    authenticator = Authenticator(identity_file)
    standing = Standing(authenticator, Proof("c.acme"))
    looked = []
    monkeypatch.setattr(
        authenticator, "identify", lambda context: looked.append(1) or standing.identity
    )
    for _ in range(5):
        standing.check()
    assert not looked
    edit(tmp_path, lambda text: text.replace(digest("bolt"), digest("bolt")[::-1]))
    assert identity_file.current is not None
    for _ in range(5):
        standing.check()
    assert looked == [1]


def test_calls_that_have_ended_are_forgotten() -> None:
    calls = OpenCalls(IdentityFile(None))
    standing = Standing(Authenticator(IdentityFile(None)), Proof("nobody"))
    calls.add(standing)
    calls.remove(standing)
    calls.remove(standing)
    assert len(calls) == 0


def test_a_call_whose_answer_is_made_is_answered_whatever_changes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC gives no status to a call that is cancelled in the middle of its first message."""
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)
    more = '[[identity]]\nname = "c"\ntenant = "acme"\ncertificates = ["c.acme"]\n'
    identity_file = IdentityFile(identities(tmp_path, more))
    calls = OpenCalls(identity_file)

    class Call(Proof):
        written: object = None

        async def read(self) -> object:
            return "asked"

        async def write(self, answer: object) -> None:
            edit(tmp_path, lambda text: text.replace("c.acme", "d.acme"))
            _ = identity_file.current
            for standing in tuple(calls._standings):
                standing.look()
            await asyncio.sleep(0)  # here a cancelled task would hear of it
            self.written = answer

    async def handler(asked: object, context: object) -> str:
        return f"{asked} and answered"

    async def continuation(details: object) -> Any:
        return grpc.unary_unary_rpc_method_handler(handler)

    async def refuse(context: object, error: CacheError) -> None:
        raise error

    call = Call("c.acme")
    places = Places(identity_file, 8, Connections())
    admission = Admission(Authenticator(identity_file), places, calls, refuse)

    async def serve() -> None:
        details = SimpleNamespace(method="/prefixcache.v1.PrefixCache/Snapshot")
        run = await admission.intercept_service(continuation, details)
        await run.stream_stream(None, call)

    asyncio.run(serve())
    assert call.written == "asked and answered"
    assert len(calls) == 0
