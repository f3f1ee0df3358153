"""What stands in the place of a salt, and what is shown to an admin only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import prefixcache
from prefixcache.client import Client
from prefixcache.errors import NotFound
from prefixcache.service.auth.identity import LOCAL, Identity
from prefixcache.service.auth.redaction import redact
from prefixcache.types import Namespace
from prefixcache.v1 import prefixcache_pb2 as pb
from service.auth.keys import TOKENS, identities
from service.service_process import LAYOUT, ServiceProcess, running, sizes

PROMPT = list(range(8))
SALTED = Namespace("tiny", tenant="acme", salt="pepper")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    flags = ("--identities", str(identities(tmp_path)), "--watch-tokens")
    with running(f"unix:{tmp_path}/s.sock", *sizes(64, 4), *flags) as service:
        yield service


def store(client: Client, salt: str) -> None:
    with client.attach("tiny", LAYOUT, salt=salt) as session, session.acquire(PROMPT) as lease:
        lease.commit(len(PROMPT))


def test_tokens_behind_a_salt_are_sent_to_who_names_it(service: ServiceProcess) -> None:
    with prefixcache.connect(service.target, token=TOKENS["acme"]) as acme:
        store(acme, "pepper")
        store(acme, "")

        def heard(**more: Namespace) -> list[bool]:
            batch = next(one for one in acme.watch(tokens=True, **more) if one.events)  # type: ignore[arg-type]
            return sorted(bool(event.stored.token_ids) for event in batch.events)

        assert heard() == [False, True]
        assert heard(namespace=SALTED) == [True]


def test_an_admin_steers_what_it_was_shown(service: ServiceProcess) -> None:
    with (
        prefixcache.connect(service.target, token=TOKENS["acme"]) as acme,
        prefixcache.connect(service.target, token=TOKENS["boss"]) as boss,
    ):
        store(acme, "pepper")
        acme.pin(SALTED, PROMPT, ttl_s=60.0)
        [shown] = [one for one in boss.snapshot().namespaces if one.salt]
        for refused in (
            lambda: acme.unpin(shown),
            lambda: acme.pin(shown, PROMPT, ttl_s=60.0),
            lambda: acme.quota(shown),
            lambda: boss.set_quota(Namespace("tiny", tenant="acme", salt="sealed-0"), max_held=1),
        ):
            with pytest.raises(NotFound, match="name the salt itself"):
                refused()
        boss.set_quota(shown, max_held=17)
        assert acme.quota(SALTED).max_held == 17
        assert boss.unpin(shown).num_pins == 1


def test_only_an_admin_is_shown_paths_and_failures() -> None:
    def shown(identity: Identity) -> pb.ServiceInfo:
        message = pb.SnapshotResponse()
        message.service.failures["recording"] = "/mnt: No space left on device"
        message.service.state.folder = "/var/lib/prefixcache"
        message.service.state.failure = "/var/lib/prefixcache: Input/output error"
        message.service.state.restored_blocks = 7
        redact(message, identity)
        return message.service

    told = shown(Identity("acme", tenant="acme"))
    assert (dict(told.failures), told.state.folder, told.state.failure) == ({}, "", "")
    assert told.state.restored_blocks == 7
    told = shown(LOCAL)
    assert told.failures
    assert told.state.folder
    assert told.state.failure
