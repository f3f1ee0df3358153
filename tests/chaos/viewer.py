"""A worker in a storm that reads its blocks side by side, and what is left of ended views.

Arguments as those of `chaos.actor`, whose requests these are.  What is verified is read through a
view of each lease (`prefixcache_kernels.contiguous`).  When a lease has ended, by whatever way, its
view has, too, and its addresses hold zeros or nothing: never what another has written since.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from chaos.actor import Actor
from chaos.pattern import Pool
from prefixcache.client import Lease, Session
from prefixcache_kernels.contiguous import ContiguousView, ContiguousViews

ROOM = 64
"""Blocks that a view has addresses for."""
LATEST_S = 10.0
"""After its lease, on a crowded machine: a view ends in the thread that hears of it."""


@dataclass
class Seen:
    """A view, and the addresses that it had."""

    view: ContiguousView
    pages: Tensor


class Viewer(Actor):
    """One life of one worker process."""

    def __init__(self, target: str, seed: int, log: str, tenant: str, patience_s: float) -> None:
        super().__init__(target, seed, log, tenant, patience_s)
        self.memory = os.open("/proc/self/mem", os.O_RDONLY)
        self.views: ContiguousViews | None = None
        self.seen: dict[int, Seen] = {}

    def serve(self, session: Session, pool: Pool, model: str) -> None:
        if self.views is None or self.views.handle != session.pool:
            if self.views is not None:
                self.views.close()
            self.views = ContiguousViews.open(session.pool)
        try:
            super().serve(session, pool, model)
        finally:
            self.look_back()

    def look(self, pool: Pool, model: str, whole: bytes, lease: Lease, end: int) -> int:
        if lease.id not in self.seen:
            assert self.views is not None
            view = self.views.of(lease, capacity=ROOM)
            self.seen[lease.id] = Seen(view, view.pages())
        pages = self.seen[lease.id].view.pages().numpy()
        slots = pages.reshape(pool.planes, -1).view(np.uint64).reshape(pool.planes, -1, pool.words)
        wrong = pool.wrong_in(slots[:, :end], model, whole[: 4 * end])
        self.tell("viewed", count=end)
        return wrong

    def look_back(self) -> None:
        """See that the views of leases that have ended have ended, and that nothing is left."""
        due = time.monotonic() + LATEST_S
        for seen in self.seen.values():
            while not seen.view.ended and time.monotonic() < due:
                time.sleep(0.01)
            left = self.left(seen.pages) if seen.view.ended else "it has not ended"
            self.tell("ended view", left=left)
        self.seen.clear()

    def left(self, pages: Tensor) -> str:
        """Say what can be read at the addresses of a view that has ended, if not nothing."""
        for plane in pages:
            try:
                found = os.pread(self.memory, plane.numel(), plane.data_ptr())
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                continue
            if any(found):
                return f"{np.count_nonzero(np.frombuffer(found, np.uint8))} bytes"
        return ""


def main(*arguments: Any) -> None:
    target, seed, log, tenant, patience_s = arguments
    Viewer(target, int(seed), log, tenant, float(patience_s)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
