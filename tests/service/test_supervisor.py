"""The processes of a service's own: they end with it, whatever they are at."""

from __future__ import annotations

import subprocess
import sys

import psutil

from service.service_process import environment, eventually

SERVICE = """
import asyncio, socket
from prefixcache.service.failures import Failures
from prefixcache.service.supervisor import Supervisor

async def main():
    hooks = {"in_hand_since": lambda: None, "ended": lambda: None, "again": lambda: None}
    supervisor = Supervisor("the sleeper", "service.sleeper", Failures(), **hooks)
    lines = supervisor.start([socket.SOCK_STREAM])
    print(supervisor.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


def test_a_process_that_is_still_at_its_imports_ends_with_its_service() -> None:
    service = subprocess.Popen(
        [sys.executable, "-c", SERVICE], stdout=subprocess.PIPE, env=environment(), text=True
    )
    assert service.stdout is not None
    process = psutil.Process(int(service.stdout.readline()))
    try:
        eventually(lambda: process.cmdline()[1:3] == ["-m", "service.sleeper"])
        service.kill()
        service.wait()
        eventually(lambda: not is_alive(process))
    finally:
        service.kill()
        service.wait()
        service.stdout.close()
        if is_alive(process):
            process.kill()


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
