"""Two services and Mooncake Store, in a network namespace of their own; says what came about.

    unshare -n python -m service.mooncake_machines FOLDER

Its clients listen on all interfaces, so there is none but the loopback.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from patience import PATIENCE_S
from service.service_process import eventually
from service.test_remote_tier import CHAT, SIZE, Machine

MASTER = 50_051
_NODE = """
import sys, time
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
told = store.setup("127.0.0.1:50081", "P2PHANDSHAKE", 64 << 20, 16 << 20, "tcp", "", sys.argv[1])
sys.stderr.write(f"node {told}\\n")
while not told:
    time.sleep(3600)
"""


def up() -> None:
    """Let the loopback be there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as loopback:
        fcntl.ioctl(loopback, 0x8914, struct.pack("16sh14x", b"lo", 1))


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class MooncakeStore:
    """A master, and a node that has the objects."""

    address = f"mooncake://127.0.0.1:{MASTER}"

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        log = stack.enter_context((folder / "mooncake.log").open("wb"))
        command = [sys.executable, "-m", "mooncake.cli", "--rpc_address=127.0.0.1"]
        command += [f"--rpc_port={MASTER}"]
        command += ["--rpc_interface=", "--metrics_host=127.0.0.1", "--metrics_port=50052"]
        command += ["--enable_metric_reporting=false", "--client_ttl=5"]
        for one in (command, [sys.executable, "-c", _NODE, f"127.0.0.1:{MASTER}"]):
            process = subprocess.Popen(one, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            self.node = process
            deadline = time.monotonic() + PATIENCE_S
            while not (listens(MASTER) if one is command else self._has_node(folder)):
                assert process.poll() is None, (folder / "mooncake.log").read_text()
                assert time.monotonic() < deadline, "Mooncake does not start"
                time.sleep(0.05)

    @staticmethod
    def _has_node(folder: Path) -> bool:
        return b"node 0" in (folder / "mooncake.log").read_bytes()


def main(folder: Path) -> None:
    """Have one machine compute, and another fetch; then let the node end."""
    up()
    with ExitStack() as stack:
        store = MooncakeStore(stack, folder)
        machines = []
        for name in "ab":
            (folder / name).mkdir()
            flags = ("--remote-interface", "lo")
            machines.append(Machine(stack, folder / name, store, *flags))
            if name == "a":
                for number in range(10):
                    machines[0].ask(number)
                eventually(lambda: machines[0].has_stored(10 * (CHAT // SIZE)))
        first, second = machines
        for number in range(6):
            if (restored := second.ask(number).restored) == CHAT:
                break
            time.sleep(1.2)  # it has not answered in time, and is not asked for a second
        assert restored == CHAT
        assert second.num_wrong == 0
        told = second.client.snapshot()
        assert told.remote_restored >= CHAT // SIZE
        assert (told.remote_wrong, told.spoilt) == (0, 0)
        sys.stdout.write("fetched\n")
        store.node.kill()
        store.node.wait()
        for number in range(6, 10):
            second.ask(number)
        assert second.num_wrong == 0
        eventually(lambda: "the remote store" in second.failures())
        for machine in (first, second):
            assert machine.client.check().failure == ""
        sys.stdout.write("lost\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
