"""Clients, sessions and leases belong to one process: not to a fork, not to who unpickles."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import prefixcache
from patience import PATIENCE_S
from prefixcache.errors import InvalidRequest
from service.service_process import LAYOUT, ServiceProcess, running, sizes

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


@pytest.fixture(scope="module")
def service(sockets: Path) -> Iterator[ServiceProcess]:
    with running(f"unix:{sockets}/fork.sock", *sizes(64, 4), "--ttl", "60") as process:
        yield process


def in_a_fork(work: Callable[[], None], *, leave: Callable[[int], None] = os._exit) -> None:
    """Run `work` in a forked child; whatever it raises, and not ending at all, fails here."""
    child = os.fork()
    if not child:
        signal.alarm(60)  # a child that hangs is killed, and seen by its status
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - told, and seen by the status
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            leave(code)
    _, status = os.waitpid(child, 0)
    assert status == 0


def test_a_forked_child_is_refused_at_once_and_disturbs_nobody(service: ServiceProcess) -> None:
    with prefixcache.connect(service.target) as client:
        session = client.attach("model", LAYOUT)
        lease = session.acquire(list(range(12)), reserve=8)

        def child() -> None:
            assert not session.alive
            calls: tuple[Callable[[], object], ...] = (
                client.snapshot,
                lambda: client.attach("model", LAYOUT),
                lambda: next(client.watch()),
                lambda: session.acquire([1]),
                lambda: session.acquire_later([1]),
                session.renew,
                lambda: lease.commit(4),
                lambda: lease.extend(16),
                lease.release,
                lambda: lease.fork(1),
            )
            for call in calls:
                with pytest.raises(InvalidRequest, match=f"process {os.getppid()} .*through fork"):
                    call()
            assert "came through fork" in repr(session)
            lease.__exit__(None, None, None)
            session.close()
            client.close()
            with (
                prefixcache.connect(service.target) as own,
                own.attach("model", LAYOUT) as mine,
                mine.acquire([5]) as held,
            ):
                assert held.id

        in_a_fork(child)
        assert session.alive
        assert lease.commit(12).num_tokens == 12
        lease.release()
        assert session.acquire([3]).release().num_freed


def test_a_forked_child_leaves_by_itself(service: ServiceProcess) -> None:
    """The interpreter's own end, with its finalizers, neither hangs nor ends a session."""
    with prefixcache.connect(service.target) as client:
        session = client.attach("model", LAYOUT)
        lease = session.acquire([1, 2, 3])
        program = (
            "import os, sys, prefixcache\n"
            "client = prefixcache.connect(sys.argv[1])\n"
            "session = client.attach('model', prefixcache.Layout(1, 1, 4, 'float32'))\n"
            "lease = session.acquire([1, 2])\n"
            "if not os.fork():\n"
            "    sys.exit(0)\n"
            "assert os.wait()[1] == 0\n"
            "lease.commit(2)\n"
            "lease.release()\n"
            "client.close()\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, service.target],
            timeout=PATIENCE_S,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        lease.release()


@pytest.mark.slow
def test_nothing_of_a_connection_is_pickled_or_copied(service: ServiceProcess) -> None:
    with prefixcache.connect(service.target) as client:
        session = client.attach("model", LAYOUT)
        lease = session.acquire([1, 2, 3])
        for thing in (client, session, lease):
            name = type(thing).__name__
            for make in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(InvalidRequest, match=f"a {name} cannot be pickled or copied"):
                    make(thing)
        assert (
            repr(session)
            == f"<Session {session.attachment.worker} at {client.address}: alive, 1 lease>"
        )
        lease.release()
