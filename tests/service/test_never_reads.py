"""A hundred callers that ask for much at once, read nothing of it, and die."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import prefixcache
from prefixcache.types import Namespace
from service.never_reads import NUM_TOKENS
from service.service_process import LAYOUT, environment, eventually, running, sizes

CALLERS = 100
MOST_MORE_MIB = 400
"""What they ask for is 1.4 GB; a part of it is in memory here, and in the kernel's buffers."""

pytestmark = pytest.mark.slow


def resident_mib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) >> 10


def num_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def test_a_hundred_who_never_read_harm_nobody_and_leave_nothing(tmp_path: Path) -> None:
    flags = (*sizes(16_384, 4), "--http", "127.0.0.1:0", "--ttl", "600")
    with (
        running(f"unix:{tmp_path}/s.sock", *flags) as service,
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as session,
    ):
        [page] = (line for line in service.lines if line.startswith("page at "))
        port = page.split("127.0.0.1:")[1].split("/")[0]
        with session.acquire(range(NUM_TOKENS), request_id="long") as lease:
            lease.commit(NUM_TOKENS)
        pid = service.process.pid
        files, before = num_files(pid), resident_mib(pid)
        rude = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("never_reads.py")),
                *(service.target, port, str(CALLERS)),
            ],
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        try:
            assert rude.stdout is not None
            assert rude.stdout.readline().startswith("all are there")
            eventually(lambda: num_files(pid) >= files + CALLERS)
            for number in range(200):  # what others do meanwhile; more is stored, and watched
                found = client.lookup(Namespace("model"), range(NUM_TOKENS))
                assert found.num_hit + found.num_partial == NUM_TOKENS - 1
                with session.acquire([10**6 + number, *range(50)]) as lease:
                    lease.commit(51)
            assert resident_mib(pid) < before + MOST_MORE_MIB
            assert client.snapshot().num_leases > 0
        finally:
            rude.kill()
            rude.communicate()
        eventually(lambda: not client.snapshot().leases)
        eventually(lambda: client.snapshot().quarantined == 0)
        eventually(lambda: num_files(pid) <= files)
        assert not client.check().failure
