"""Runs a command that ends when the process that wanted it ends, however that ends (Linux).

`python tied.py PARENT SIGNAL COMMAND...` asks the kernel for a signal at the parent's death, then
becomes the command: same process id, same pipes.  A file of its own, because code between fork and
exec is not safe in a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

PR_SET_PDEATHSIG: Final = 1


def to_this(number: int) -> list[str]:
    """Give what has to stand before a command line: this process is the parent.

    The kernel ends what is tied when the thread that has started it ends.
    """
    return [sys.executable, "-IS", __file__, str(os.getpid()), str(int(number))]


def main(parent: int, number: int, command: list[str]) -> None:
    """Become `command`, which gets a signal when the process `parent` dies.  Does not return."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it ended before the line above
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - the parent's own command line


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
