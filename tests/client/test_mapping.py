"""A mapping of the pool belongs to the process that made it: its death is the end of its writes."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import prefixcache
from prefixcache.pool import map_pool
from service.service_process import LAYOUT, running, sizes

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


@pytest.mark.slow
def test_a_forked_child_has_not_the_pool_and_one_that_is_executed_no_descriptor(
    sockets: Path,
) -> None:
    with (
        running(f"unix:{sockets}/mapping.sock", *sizes(16, 4)) as service,
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as session,
    ):
        memory = map_pool(session.pool)
        memory[session.pool.offset] = 7
        child = os.fork()
        if not child:
            faulthandler.disable()  # its death is what is asked for
            if session.pool.name in Path("/proc/self/maps").read_text():
                os._exit(1)
            memory[session.pool.offset] = 9
            os._exit(2)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGSEGV
        assert memory[session.pool.offset] == 7

        names = (
            "import pathlib\n"
            "for path in pathlib.Path('/proc/self/fd').iterdir():\n"
            "    print(path.readlink() if path.exists() else '')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", names], close_fds=False, capture_output=True, text=True
        )
        assert session.pool.name not in done.stdout
        assert done.returncode == 0, done.stderr
