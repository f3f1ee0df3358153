"""A tenant's processes, when its identity is taken out of the file, beside another tenant's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prefixcache
from patience import PATIENCE_S
from service.auth.keys import TOKENS, identities
from service.auth.test_standing import edit, without
from service.service_process import command, environment, eventually, running, sizes

TENANTS = ("acme", "bolt")
NUM_TOKENS = 12


@contextmanager
def program(whose: str, target: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process that shows the token of one tenant."""
    more = {"PREFIXCACHE_TOKEN": TOKENS[whose], "PREFIXCACHE_TARGET": target}
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment() | more,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def worker(whose: str, target: str) -> Any:
    script = str(Path(__file__).parents[1] / "victim.py")
    return program(whose, target, sys.executable, script, target, str(NUM_TOKENS), "4", "tiny")


def watch(whose: str, target: str) -> Any:
    return program(whose, target, *command("watch", "--json"))


def told(process: subprocess.Popen[str], question: str = "") -> str:
    """Its next line, asked for by one of ours."""
    assert process.stdin is not None
    assert process.stdout is not None
    if question:
        process.stdin.write(question)
        process.stdin.flush()
    return process.stdout.readline().strip()


def test_processes_of_who_is_taken_out_are_out_and_those_of_others_go_on(tmp_path: Path) -> None:
    flags = ("--identities", str(identities(tmp_path)), "--ttl", "60")
    with running(f"unix:{tmp_path}/s.sock", *sizes(64, 4), *flags) as service:
        target = service.target
        boss = prefixcache.connect(target, token=TOKENS["boss"])

        def held() -> dict[str, int]:
            tenants = [lease.namespace.tenant for lease in boss.snapshot().leases]
            return {tenant: tenants.count(tenant) for tenant in TENANTS}

        with (
            worker("acme", target) as red,
            worker("bolt", target) as blue,
            watch("acme", target) as red_watch,
            watch("bolt", target) as blue_watch,
        ):
            assert told(red).startswith("holding")
            assert told(blue).startswith("holding")
            for watching in (red_watch, blue_watch):  # each sees its own tenant's first block
                assert '"Snapshot"' in told(watching)
                assert '"parent_block_hash"' in told(watching)
            edit(tmp_path, without("acme-serving"))

            assert red_watch.wait(PATIENCE_S) == 1
            assert red_watch.stderr is not None
            assert "Traceback" not in (said := red_watch.stderr.read())
            assert "nobody has this token" in said
            eventually(lambda: held() == {"acme": 0, "bolt": 1})
            assert told(red, "commit\n") in ("ServiceUnavailable", "Unauthenticated")
            # Its process lives, and may write on: nobody gets these blocks before its end.
            assert boss.snapshot().quarantined == NUM_TOKENS // 4 - 1
            os.kill(red.pid, signal.SIGKILL)
            eventually(lambda: boss.snapshot().quarantined == 0)

            assert told(blue, "commit\n").startswith("Committed")
            assert '"parent_block_hash"' in told(blue_watch)
            assert blue_watch.poll() is None
            assert held() == {"acme": 0, "bolt": 1}
        boss.close()
