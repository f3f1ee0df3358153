"""A service of this process's own, for who finds none: it ends with it, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Final

import prefixcache
from prefixcache import tied
from prefixcache.errors import ServiceUnavailable
from prefixcache.run_folder import RunFolder
from prefixcache_worker.child import STOP_S
from prefixcache_worker.child_service import SERVE

_READY_S: Final = 60.0


class OwnService:
    """`prefixcache serve` on a socket in a folder that only this user enters.

    Args:
        options: of `prefixcache serve`.

    Raises:
        ServiceUnavailable: it ended, or did not answer in time; with what it wrote.
    """

    def __init__(self, *options: str) -> None:
        self._folder = RunFolder("pfx-llm-")
        self.target = f"unix:{self._folder.path}/s.sock"
        errors = self._folder.path / "stderr"
        self._process = self._start(options, errors)
        deadline = time.monotonic() + _READY_S
        try:
            while True:
                with suppress(ServiceUnavailable):
                    prefixcache.connect(self.target, timeout_s=2).close()
                    return
                if self._process.poll() is not None or time.monotonic() > deadline:
                    told = errors.read_text(errors="replace").strip()
                    raise ServiceUnavailable(f"a service of its own did not start:\n{told}")
                time.sleep(0.05)
        except BaseException:
            self.stop()
            raise

    def _start(self, options: Sequence[str], errors: Path) -> subprocess.Popen[bytes]:
        """Start it from a thread that lives as long as it does.

        The kernel ends what is tied when the thread that started it ends: the caller's may.
        """
        started: Future[subprocess.Popen[bytes]] = Future()

        def keep() -> None:
            try:
                with errors.open("wb") as file:
                    process = subprocess.Popen(
                        [
                            *tied.to_this(signal.SIGTERM),
                            *(*SERVE, "--listen", self.target, *options),
                        ],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=file,
                        env={
                            **os.environ,
                            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                        },
                        start_new_session=True,
                    )
            except BaseException as fault:  # noqa: BLE001 - raised where it was asked for
                started.set_exception(fault)
                return
            started.set_result(process)
            process.wait()

        threading.Thread(target=keep, name="own-service", daemon=True).start()
        return started.result()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def stop(self) -> None:
        """End it: SIGTERM, a few seconds of patience, SIGKILL.  Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.close()
