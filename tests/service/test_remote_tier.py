"""Two services and one store: what the one has computed the other fetches, whatever fails.

Two services with workers of their own stand for two machines.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

import prefixcache
from cli.running import At
from prefixcache.cli import status
from prefixcache.client import Client
from prefixcache.errors import InvalidRequest
from prefixcache.pool import map_pool, pages_of
from prefixcache.types import Ledger, Namespace
from service.below import carriers
from service.service_process import LAYOUT, ServiceProcess, eventually, running, sizes, stop
from service.valkey_server import ValkeyServer, needs_valkey

pytestmark = needs_valkey

MODEL = "model@1"
NUM_BLOCKS, SIZE = 256, 4
CHAT = 80
"""Tokens of a chat that are kept: twenty whole blocks."""


class Machine:
    """A service with a worker: what a block holds depends on all tokens up to its end."""

    token_s = 0.0
    """How long computing a token takes."""

    def __init__(
        self,
        stack: ExitStack,
        folder: Path,
        store: ValkeyServer,
        *flags: str,
        first: tuple[Path, ...] = (),
    ) -> None:
        self.service: ServiceProcess = stack.enter_context(
            running(
                f"unix:{folder}/cache.sock",
                *sizes(NUM_BLOCKS, SIZE),
                *("--remote", store.address, "--partial", "off", "--grace", "1", *flags),
                first=first,
            )
        )
        eventually(lambda: "carrier at work" in self.service.log())
        self.client: Client = stack.enter_context(prefixcache.connect(self.service.target))
        self.session = self.client.attach(MODEL, LAYOUT)
        handle = self.session.pool
        self.pages = pages_of(map_pool(handle), handle)
        self.num_wrong = 0

    @staticmethod
    def chat(number: int) -> list[int]:
        return [number * 1000 + at for at in range(CHAT + 1)]

    def content(self, tokens: list[int], at: int) -> np.ndarray:
        """What block `at` of a prompt is to hold."""
        seed = blake2b(repr(tokens[: (at + 1) * SIZE]).encode(), digest_size=8).digest()
        shape = self.pages[:, 0].shape
        return np.random.default_rng(int.from_bytes(seed)).integers(0, 256, shape, np.uint8)

    def ask(self, number: int, wait_s: float = 30.0) -> Ledger:
        """Have a chat computed, as far as it is not cached; see that what is cached is right."""
        tokens = self.chat(number)
        with self.session.acquire(tokens, wait_s=wait_s) as lease:
            for at in range(CHAT // SIZE):
                block = lease.block_table[at]
                if at * SIZE < lease.num_cached:
                    self.num_wrong += not (self.pages[:, block] == self.content(tokens, at)).all()
                else:
                    self.pages[:, block] = self.content(tokens, at)
            time.sleep(self.token_s * (CHAT - lease.num_cached))
            lease.commit(CHAT)
            return lease.ledger

    def has_stored(self, num_blocks: int) -> bool:
        return self.client.snapshot().remote_stored >= num_blocks

    def failures(self) -> dict[str, str]:
        return status.read(self.client).info.failures

    def carrier(self) -> int:
        """The carrier's process; 0 if there is none."""
        return next(iter(carriers(self.service)), 0)


@pytest.fixture
def store(tmp_path: Path, stack: ExitStack) -> ValkeyServer:
    server = ValkeyServer(tmp_path)
    stack.callback(server.kill)
    return server


@pytest.fixture
def first(tmp_path: Path, stack: ExitStack, store: ValkeyServer) -> Machine:
    """A machine that has computed and stored some chats."""
    (tmp_path / "a").mkdir()
    machine = Machine(stack, tmp_path / "a", store)
    for number in range(5):
        machine.ask(number)
    eventually(lambda: machine.has_stored(100))
    return machine


@pytest.fixture
def second(tmp_path: Path, stack: ExitStack, store: ValkeyServer, first: Machine) -> Machine:
    (tmp_path / "b").mkdir()
    return Machine(stack, tmp_path / "b", store)


def test_a_start_says_where_and_that_nothing_is_signed(first: Machine) -> None:
    told = next(line for line in first.service.lines if "for other machines" in line)
    assert "valkey+unix:///" in told
    assert "not signed" in told


def test_the_first_request_of_a_cold_machine_comes_from_the_store(second: Machine) -> None:
    ledger = second.ask(0)
    assert (ledger.restored, ledger.cold) == (CHAT, 1)
    for number in range(1, 5):
        second.ask(number)
    assert second.num_wrong == 0
    told = second.client.snapshot()
    assert told.remote_restored >= 20
    assert (told.remote_wrong, told.spoilt) == (0, 0)
    assert second.client.check().failure == ""


def test_explain_says_what_lies_there_and_how_long_it_takes(second: Machine) -> None:
    prompt = str(second.chat(0))
    told = At(second.service.target).call("explain", "-", "--model", MODEL, given=prompt)
    assert f"tokens 0 to {CHAT - 1} lie on REMOTE: " in told.out
    assert "ms to fetch" in told.out
    second.ask(0)
    told = At(second.service.target).call("explain", "-", "--model", MODEL, given=prompt)
    assert "REMOTE" not in told.out, "it is in the pool"


def test_what_a_machine_has_fetched_it_does_not_store_again(
    second: Machine, store: ValkeyServer
) -> None:
    before = store.keys()
    second.ask(0)
    second.ask(100)
    eventually(lambda: second.has_stored(20))
    assert second.client.snapshot().remote_stored == 20
    assert set(before) < set(store.keys())


def test_an_object_that_lies_is_computed_and_removed(second: Machine, store: ValkeyServer) -> None:
    names = store.keys()
    size = int(store.call("STRLEN", names[0])[1:])
    for name in names:
        store.call("SETRANGE", name, str(size - 5), b"lied!")
    assert second.ask(0).restored == 0
    assert second.num_wrong == 0
    eventually(lambda: second.client.snapshot().remote_wrong)
    eventually(lambda: len(store.keys()) < 100 or second.has_stored(1))
    told = status.read(second.client)
    assert any("wrong" in line for line in status.tiers(told.snapshot))
    assert second.client.check().failure == ""


@pytest.mark.parametrize("words", [("LPUSH",), ("SET",)])
def test_what_cannot_be_an_object_is_removed_and_the_store_goes_on(
    second: Machine, store: ValkeyServer, words: tuple[str, ...]
) -> None:
    names = store.keys()
    size = store.call("STRLEN", names[0])
    for name in names:
        store.call("UNLINK", name)
        store.call(*words, name, "x")
    for number in range(5):
        assert second.ask(number).restored == 0
    eventually(lambda: second.client.snapshot().remote_wrong)
    left = {b"-WRONGTYPE", b":1"}  # removed, or stored again already
    eventually(lambda: {store.call("STRLEN", one).split()[0] for one in names} - left)
    assert {store.call("STRLEN", one).split()[0] for one in names} <= {*left, b":0", size}
    assert not second.failures()
    assert second.ask(200).cold
    eventually(lambda: second.has_stored(20))
    assert second.client.check().failure == ""


def test_the_path_of_a_store_may_have_any_character(tmp_path: Path, stack: ExitStack) -> None:
    folder = tmp_path / "100%41 ?#é"
    folder.mkdir()
    store = ValkeyServer(folder)
    stack.callback(store.kill)
    machine = Machine(stack, tmp_path, store)
    machine.ask(0)
    eventually(lambda: machine.has_stored(20))
    assert len(store.keys()) == 20


def test_objects_that_have_changed_places_are_found_out(
    second: Machine, store: ValkeyServer
) -> None:
    one, *others = store.keys()
    for name in others:
        store.call("COPY", one, name, "REPLACE")
    for number in range(5):
        assert second.ask(number).restored <= SIZE
    assert second.num_wrong == 0
    assert second.client.snapshot().remote_wrong


def test_a_store_that_hangs_costs_nobody_more_than_a_moment(
    second: Machine, store: ValkeyServer
) -> None:
    store.stop()
    try:
        for number in range(5):
            assert second.ask(number).restored == 0
        told = second.client.snapshot()
        assert 1 <= told.remote_late < 5
        eventually(lambda: "the remote store" in second.failures())
    finally:
        store.go_on()
    second.client.reset(Namespace(MODEL))
    eventually(lambda: second.ask(200).cold and second.has_stored(20))
    eventually(lambda: not second.failures())
    assert second.num_wrong == 0
    assert second.client.check().failure == ""


def test_a_store_that_begins_again_with_nothing_is_filled_again(
    first: Machine, store: ValkeyServer
) -> None:
    store.kill()
    first.ask(10)
    eventually(lambda: "the remote store" in first.failures())
    store.restart()
    number = 11

    def stores() -> bool:
        nonlocal number
        number += 1
        first.ask(number)
        return bool(store.keys())

    eventually(stores)
    eventually(lambda: not first.failures())
    assert first.num_wrong == 0


def test_a_carrier_that_is_killed_is_replaced(second: Machine) -> None:
    killed = second.carrier()
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: second.carrier() not in (0, killed))
    eventually(lambda: not second.failures())
    assert CHAT in [second.ask(number).restored for number in range(5)]
    assert second.num_wrong == 0
    assert second.client.check().failure == ""


def test_who_waits_for_a_carrier_that_hangs_is_served_without_him(second: Machine) -> None:
    carrier = second.carrier()
    stop(carrier)
    try:
        assert second.ask(0).restored == 0
    finally:
        os.kill(carrier, signal.SIGKILL)
    eventually(lambda: second.carrier() not in (0, carrier))
    eventually(lambda: second.client.snapshot().num_leases == 0)
    assert second.client.check().failure == ""
    eventually(lambda: not second.failures())
    before = second.client.snapshot().remote_stored
    second.ask(300)
    eventually(lambda: second.has_stored(before + 20))


def test_a_reset_is_not_undone_by_the_store(second: Machine) -> None:
    assert second.ask(0).restored == CHAT
    second.client.reset(Namespace(MODEL))
    assert second.ask(0).restored == 0
    assert second.ask(1).restored == 0


def test_a_reset_of_all_counts_for_what_nobody_has_asked_for_in_this_life(second: Machine) -> None:
    second.client.reset_unnamed()  # the first machine has stored it
    assert second.ask(0).restored == 0
    eventually(lambda: second.has_stored(20))
    second.client.reset(Namespace(MODEL))
    second.client.reset_unnamed()
    assert second.ask(0).restored == 0, "of what was stored since the last one"


def test_a_reset_of_all_counts_before_a_worker_has_attached(
    tmp_path: Path, stack: ExitStack, store: ValkeyServer, first: Machine
) -> None:
    flags = ("--memory", "4MiB", "--block-size", str(SIZE), "--remote", store.address)
    for is_reset in (False, True):
        target = f"unix:{tmp_path}/early.sock"
        service = stack.enter_context(running(target, *flags, "--partial", "off", "--grace", "1"))
        client = stack.enter_context(prefixcache.connect(target))
        if is_reset:
            client.reset_unnamed()
        session = client.attach(MODEL, LAYOUT)
        eventually(lambda service=service: "carrier at work" in service.log())
        with session.acquire(Machine.chat(0), wait_s=30.0) as lease:
            assert lease.ledger.restored == (0 if is_reset else CHAT)
        service.close()


def test_the_next_life_does_not_find_what_was_reset_and_finds_what_was_stored_since(
    tmp_path: Path, stack: ExitStack, store: ValkeyServer, first: Machine
) -> None:
    (tmp_path / "b").mkdir()
    disk = f"1MiB:{tmp_path / 'b' / 'disk'}"
    life = Machine(stack, tmp_path / "b", store, "--disk", disk)
    assert life.ask(0).restored == CHAT
    life.client.reset(Namespace(MODEL))
    assert life.ask(0).restored == 0
    eventually(lambda: life.has_stored(20))
    for number in (1, 0):
        life.service.signal(signal.SIGKILL)
        life.service.wait()
        life = Machine(stack, tmp_path / "b", store, "--disk", disk)
        assert life.client.snapshot().disk_restored == 0
        assert life.ask(number).restored == (0 if number else CHAT)
        assert life.num_wrong == 0
    assert life.client.snapshot().remote_restored == 20
    told = [one for one in first.service.lines if "finds again what a reset" in one]
    assert len(told) == 1, "who has no folder says so"
    assert not any("finds again what a reset" in one for one in life.service.lines)


def test_a_secret_makes_names_that_others_cannot_guess_and_signs(
    tmp_path: Path, stack: ExitStack, store: ValkeyServer, first: Machine
) -> None:
    names = set(store.keys())
    secret = tmp_path / "secret"
    secret.write_bytes(os.urandom(32))
    secret.chmod(0o600)
    machines = []
    for name in "cd":
        (tmp_path / name).mkdir()
        flags = ("--remote-secret", str(secret))
        machines.append(Machine(stack, tmp_path / name, store, *flags))
        machines[-1].ask(0)
        eventually(lambda: machines[0].has_stored(20))
    one, other = machines
    assert one.client.snapshot().remote_restored == 0, "of those without the secret"
    assert other.client.snapshot().remote_restored == 20
    assert other.num_wrong == 0
    signed = sorted(set(store.keys()) - names)
    assert len(signed) == 20
    # A store that has the sums right, but not the signature: another's bytes.
    for name in signed:
        store.call("SETRANGE", name, "40", b"\0" * 32)
    other.client.reset(Namespace(MODEL))
    assert other.ask(0).restored == 0


def test_a_model_without_its_weights_in_the_name_is_refused(first: Machine) -> None:
    with pytest.raises(InvalidRequest, match="NAME@REVISION"):
        first.client.attach("model", LAYOUT)
