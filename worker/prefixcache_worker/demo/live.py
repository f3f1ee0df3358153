"""The moving view in a terminal: workers, the pool, the latest requests, and the totals."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from prefixcache.texts import many
from prefixcache.types import Snapshot
from prefixcache_worker.demo.compare import Difference
from prefixcache_worker.demo.record import Death, Request
from prefixcache_worker.demo.view import PlainView, View, obituary, request_table

PIPE_WIDTH: Final = 160
"""Columns of tables where there is no terminal to ask."""
FRAMES_PER_S: Final = 5
NUM_LATEST: Final = 12


def open_console(*, stderr: bool) -> Console:
    """Give where people read: as wide as the terminal, or as tables need in a pipe."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=PIPE_WIDTH)


def open_view(console: Console, workers: Sequence[str], num_requests: int) -> View:
    """Give the moving view in a terminal, plain lines in a pipe."""
    if console.is_terminal:
        return LiveView(console, workers, num_requests)
    return PlainView(console)


class LiveView:
    """Draws the state five times a second, in a thread of its own; about 2 % of a core."""

    def __init__(self, console: Console, workers: Sequence[str], num_requests: int) -> None:
        self._width = console.width - 4
        self._workers = list(workers)
        self._num_requests = num_requests
        self._running: dict[str, Request] = {}
        self._served: dict[str, int] = dict.fromkeys(workers, 0)
        self._latest: deque[Request] = deque(maxlen=NUM_LATEST)
        self._sentences: deque[str] = deque(maxlen=5)
        self._title, self._explanation = "", ""
        self._sent = self._computed = self._done = 0
        self._compared: list[str] = []
        self._num_ties = 0
        self._death: Death | None = None
        self._snapshot: Snapshot | None = None
        self._began_s = time.monotonic()
        self._live = Live(
            console=console,
            get_renderable=self._draw,
            refresh_per_second=FRAMES_PER_S,
            transient=True,
        )
        self._live.start()

    def say(self, text: str) -> None:
        """Show a sentence below the title; it is pushed out by later ones."""
        self._sentences.append(text)

    def phase(self, number: int, title: str, explanation: str) -> None:
        """Change the title."""
        self._title, self._explanation = f"{number}. {title}", explanation
        self._sentences.clear()

    def sent(self, request: Request) -> None:
        """Show the request at its worker."""
        self._running[request.id] = request

    def finished(self, request: Request) -> None:
        """Move the request to the list of the latest, and count it."""
        self._running.pop(request.id, None)
        self._latest.append(request)
        self._done += 1
        self._served[request.worker] = self._served.get(request.worker, 0) + 1
        self._sent += len(request.prompt)
        self._computed += request.num_computed

    def died(self, death: Death) -> None:
        """Mark the worker as dead and say what came back."""
        self._death = death
        self._sentences.extend(obituary(death))

    def settled(self, death: Death) -> None:
        """Count what the dead worker had computed and others go on using."""
        self._computed += sum(attempt.num_kept for attempt in death.attempts)

    def pool(self, snapshot: Snapshot) -> None:
        """Show how full the pool is."""
        self._snapshot = snapshot

    def compared(self, request: Request, differences: Sequence[Difference]) -> None:
        """Count an answer as compared."""
        self._compared.append(request.id)
        self._num_ties += sum(difference.tie for difference in differences)
        self._sentences.extend(str(difference) for difference in differences)

    def close(self) -> None:
        """Take the moving view away; the summary follows."""
        self._live.stop()

    # Drawing happens in the thread of `Live`; it reads what the methods above have stored, and
    # takes copies of what they may change meanwhile.

    def _draw(self) -> RenderableType:
        head = Text.assemble(
            (self._title, "bold"), f"   {time.monotonic() - self._began_s:.0f} s", justify="left"
        )
        notes = [Text(text) for text in list(self._sentences)]
        return Panel(
            Group(
                head,
                Text(self._explanation, style="dim"),
                *notes,
                Text(),
                self._lanes(),
                Text(),
                request_table(list(self._latest), self._width),
                Text(),
                self._totals(),
            ),
            title="prefixcache demo",
            border_style="dim",
        )

    def _lanes(self) -> Table:
        table = Table.grid(padding=(0, 2))
        running = list(self._running.values())
        for worker in self._workers:
            dead = self._death is not None and self._death.worker == worker
            mine = [request for request in running if request.worker == worker]
            doing = Text("  ".join(map(_doing, mine)) or "idle", overflow="ellipsis", no_wrap=True)
            if dead and not self._compared:
                doing = Text("killed", style="bold red")
            table.add_row(
                Text(worker, style="bold"), f"{self._served.get(worker, 0):>3} served", doing
            )
        return table

    def _totals(self) -> Text:
        line = Text.assemble(
            (f"{self._done}", "bold"),
            f" of {self._num_requests} requests   ",
            (f"{self._sent:,}", "bold"),
            " prompt tokens sent   ",
            (f"{self._computed:,}", "bold green"),
            " computed",
        )
        if self._sent:
            line.append(f" ({100 * self._computed / self._sent:.0f} %)")
        if (pool := self._snapshot) is not None:
            used = pool.private + pool.indexed
            line.append(f"   pool {used:,} of {many(pool.num_blocks, 'block')}, ")
            line.append(f"{many(len(pool.leases), 'lease')}, {pool.waiting} waiting")
        if self._compared:
            line.append(
                f"\n{len(self._compared)} of {self._num_requests} answers compared with the run "
                f"without a cache, {self._num_ties} numerical ties",
                style="bold",
            )
        return line


def _doing(request: Request) -> str:
    if request.granted_s is None:
        return f"{request.id} waits"
    if request.first_s is None:
        return f"{request.id} prefills {len(request.prompt) - request.ledger.reused:,}"
    return f"{request.id} answers {len(request.answer)}"
