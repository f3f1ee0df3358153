"""Dynamo's standalone indexer in a network namespace of its own, and who asks it.

It listens on all interfaces, so there are none but the loopback one.  What is published reaches it
by a path.  Run by the interpreter of `.venv-dynamo`; reads requests, one a line in JSON, and writes
the answers.
"""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import subprocess
import sys
import time
from http.client import HTTPConnection
from typing import Any

PORT = 50890
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_RUN = "import sys, dynamo._core as core; core.run_kv_indexer(sys.argv[1:])"


def ask(path: str, body: dict[str, Any] | None) -> Any:
    """Send one request; give the answer, or what is wrong with it."""
    server = HTTPConnection("127.0.0.1", PORT)
    headers = {"content-type": "application/json"}
    server.request("GET" if body is None else "POST", path, json.dumps(body), headers)
    answer = server.getresponse()
    text = answer.read().decode()
    server.close()
    try:
        return json.loads(text)
    except ValueError:
        return {"error": answer.status, "text": text}


def tell(line: str) -> None:
    """Write a line to who has started this."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve requests from stdin until it ends."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as loopback:
        fcntl.ioctl(loopback, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
    flags = ["--port", str(PORT), "--block-size", sys.argv[1]]
    indexer = subprocess.Popen([sys.executable, "-c", _RUN, *flags], stdout=sys.stderr)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", PORT), timeout=1).close()
                break
            except OSError:
                if indexer.poll() is not None:
                    sys.exit(f"the indexer has ended: {indexer.returncode}")
                time.sleep(0.1)
        tell("ready")
        for line in sys.stdin:
            path, body = json.loads(line)
            tell(json.dumps(ask(path, body)))
    finally:
        indexer.kill()
        indexer.wait()


if __name__ == "__main__":
    main()
