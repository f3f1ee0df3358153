"""A disk that takes 200 ms for a block, and a store that hangs: few ever wait for either."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from service.service_process import eventually
from service.test_remote_tier import Machine
from service.valkey_server import ValkeyServer, needs_valkey

pytestmark = needs_valkey

NUM_CHATS = 30
"""More than twice as much as the pool holds: in turn, each of them is on the disk when it comes."""
NUM_REQUESTS = 60
"""Fewer than those after which nothing goes down any more, since it does not pay."""
FEW = 10
"""Who wait before it is known how slow it is: on a crowded machine computing is slow, too."""
SLOW = """
import os, sys, time

if "prefixcache.service.tiers.porter" in sys.orig_argv:
    quick = os.preadv

    def slow(*arguments):
        time.sleep(0.2)
        return quick(*arguments)

    os.preadv = slow
"""
"""What each process of the service runs first."""


@pytest.fixture
def machine(tmp_path: Path, stack: ExitStack) -> Machine:
    """One whose chats have all been computed, and whose store hangs since then."""
    store = ValkeyServer(tmp_path)
    stack.callback(store.kill)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sitecustomize.py").write_text(SLOW)
    disk = ("--disk", f"16MiB:{tmp_path / 'disk'}")
    made = Machine(stack, tmp_path, store, *disk, first=(tmp_path / "first",))
    eventually(lambda: "porter at work" in made.service.log())
    made.token_s = 0.0005
    serve(made, NUM_CHATS)
    store.stop()
    return made


def serve(machine: Machine, count: int) -> None:
    """Ask for chats in turn; each time what is evicted gets to the disk."""
    for number in range(count):
        machine.ask(number % NUM_CHATS)
        eventually(lambda: not machine.client.snapshot().leaving)


def test_who_asks_for_what_lies_on_slow_tiers_computes_it_instead(machine: Machine) -> None:
    before = machine.client.snapshot()
    serve(machine, NUM_REQUESTS)
    told = machine.client.snapshot()
    assert told.disk_used > 256
    assert told.declined_slow - before.declined_slow >= NUM_REQUESTS - FEW
    assert told.remote_late - before.remote_late <= FEW
    assert machine.num_wrong == 0
    assert machine.client.check().failure == ""
