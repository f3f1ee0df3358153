"""Runs a command that ends when the process that wanted it ends, however that ends (Linux).

`python tied.py PARENT COMMAND...` asks the kernel for SIGTERM at the parent's death, then becomes
the command: same process id, same pipes.  A file of its own, because code between fork and exec is
not safe in a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

PR_SET_PDEATHSIG: Final = 1


def main(parent: int, command: list[str]) -> None:
    """Become `command`, tied to the life of the process `parent`.  Does not return."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the line above
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - the parent's own command line


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
