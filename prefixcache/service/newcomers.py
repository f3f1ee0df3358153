"""Newcomers: of who connects to a TCP address, a share is let in, and the kernel ignores the rest.

```
what newcomers did in the last moments ─► more than the most a second: half as many are let in
                                          less: a tenth more, until all are
```
A server accepts whoever comes, and ends a connection once it has done something; so whoever
comes again at once could do as much each time.  A filter at the listening socket drops the first
packet of a connection, by lot: nobody is told anything, and a kernel that hears nothing tries again
after a second, then after two.  Connections that stand are not touched.

The filter is a classic BPF program (linux/filter.h): any user may attach one to its own socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from time import monotonic
from typing import Final

_FEWEST: Final = 1 / 256
_SO_ATTACH_FILTER: Final = 26
_SO_DETACH_FILTER: Final = 27
_INSTRUCTION: Final = struct.Struct("HBBI")
_LOAD_BYTE, _LOAD_WORD, _IF_BITS, _IF_AT_LEAST, _RETURN = 0x30, 0x20, 0x45, 0x35, 0x06
_FLAGS_AT, _SYN = 13, 0x02
_RANDOM: Final = 0xFFFFF000 + 56
"""Where the kernel shows a program 32 random bits."""
_ALL: Final = 0xFFFFFFFF


class Newcomers:
    """Who connects to some addresses of this process.

    Args:
        most: What they may do a second, in whatever is counted.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._listening: dict[int, int] = {}
        self._done = 0
        self._counted_at = monotonic()
        self.share = 1.0
        """Of those who connect, how many are let in."""

    def add(self, fd: int) -> None:
        """Have a listening socket among the addresses.  Idempotent."""
        self._listening[os.fstat(fd).st_ino] = fd

    def count(self, number: int = 1) -> None:
        """Count what a newcomer did, or may have begun.  O(1)."""
        self._done += number

    def pace(self) -> bool:
        """Let fewer in, or more again; give whether fewer are than come.

        Call it some times a second.  O(addresses).  A kernel without such filters lets all in.
        """
        now = monotonic()
        rate = self._done / max(now - self._counted_at, 1e-3)
        self._done, self._counted_at = 0, now
        share = min(1.0, self.share * 1.1)
        if rate > self._most:
            share = max(_FEWEST, self.share * max(0.5, self._most / rate))
        if share != self.share:
            self.share = share
            for inode, fd in self._listening.items():
                with contextlib.suppress(OSError):
                    if os.fstat(fd).st_ino == inode:
                        _let_in(fd, share)
        return share < 1


def _let_in(fd: int, share: float) -> None:
    listening = socket.socket(fileno=fd)
    try:
        if share >= 1:
            listening.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
            return
        program = (
            (_LOAD_BYTE, 0, 0, _FLAGS_AT),
            (_IF_BITS, 0, 2, _SYN),
            (_LOAD_WORD, 0, 0, _RANDOM),
            (_IF_AT_LEAST, 1, 0, int(share * _ALL)),
            (_RETURN, 0, 0, _ALL),
            (_RETURN, 0, 0, 0),
        )
        code = ctypes.create_string_buffer(b"".join(_INSTRUCTION.pack(*one) for one in program))
        filter_ = struct.pack("HP", len(program), ctypes.addressof(code))
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)
    finally:
        listening.detach()
