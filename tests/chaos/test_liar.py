"""That what lies before a store does lie, and tells the truth when it is not asked to."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from random import Random

import pytest

from chaos import liar
from chaos.liar import Liar
from prefixcache.remote_address import parse_remote
from prefixcache.service.tiers.remote.store import RemoteError
from prefixcache.service.tiers.remote.valkey import Valkey
from service.valkey_server import ValkeyServer, needs_valkey

pytestmark = needs_valkey

NAMES = [f"k{at}" for at in range(8)]
OBJECTS = [memoryview(bytes([at]) * 70_000) for at in range(8)]


@pytest.fixture
def before(tmp_path: Path, stack: ExitStack) -> Liar:
    server = ValkeyServer(tmp_path)
    stack.callback(server.kill)
    before = Liar(tmp_path / "liar.sock", server.path, Random(1))
    stack.callback(before.close)
    return before


@pytest.fixture
def store(before: Liar, stack: ExitStack) -> Valkey:
    address = parse_remote(before.address)
    assert address is not None
    store = stack.enter_context(closing(Valkey(address)))
    assert store.put_from(NAMES, OBJECTS) == [True] * 8
    return store


def fetch(store: Valkey) -> list[str]:
    """Fetch all; say of each what came."""
    slots = [memoryview(bytearray(70_000)) for _ in NAMES]
    told = []
    for is_there, slot, own in zip(store.get_into(NAMES, slots), slots, OBJECTS, strict=True):
        what = "right" if slot == own else "another's" if slot in OBJECTS else "flipped"
        told.append(what if is_there else "missing")
    return told


def test_it_passes_on_what_is_said(store: Valkey) -> None:
    assert fetch(store) == ["right"] * 8
    assert store.exists([*NAMES, "other"]) == b"\1" * 8 + b"\0"


def test_a_lie_is_another_object_or_a_changed_one_or_a_short_one(
    before: Liar, store: Valkey
) -> None:
    before.mood = "lies"
    told: set[str] = set()
    lies = {"flipped", "another's", "truncated", "withheld"}
    while told != {"right", "another's", "flipped", "missing"} or not lies <= set(before.told):
        told.update(fetch(store))
    while b"\0" not in store.exists(NAMES):
        pass
    before.mood = ""
    assert fetch(store) == ["right"] * 8


def test_a_line_that_is_cut_is_an_error_and_the_next_one_is_used(
    before: Liar, store: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liar, "CUT", 1.0)
    before.mood = "cuts"
    with pytest.raises(RemoteError):
        fetch(store)
    before.mood = ""
    assert fetch(store) == ["right"] * 8
    before.mute()
    with pytest.raises(RemoteError, match="does not answer"):
        store.exists(NAMES)
    before.drop()
    before.speak()
    assert fetch(store) == ["right"] * 8
