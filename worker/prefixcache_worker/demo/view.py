"""What people see while the demo runs: a moving picture in a terminal, plain lines in a pipe.

Both are told the same things.  Nothing is said by colour alone: fates have words and glyphs.

```
█ hit     whole blocks, read in place          ▒ joined    computed by another worker meanwhile
▓ partial first slots of a block, copied       · computed  by this worker
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefixcache.texts import many
from prefixcache.types import Snapshot
from prefixcache_worker.demo.compare import Difference
from prefixcache_worker.demo.record import Death, Fate, Request

STYLES: Final = {
    Fate.COLD: "bold blue",
    Fate.JOINED: "yellow",
    Fate.TAKEOVER: "magenta",
    Fate.WARM: "green",
}


class View(Protocol):
    """What the demo tells while it runs.  No method blocks or fails."""

    def say(self, text: str) -> None:
        """Show a sentence that is not about one request."""

    def phase(self, number: int, title: str, explanation: str) -> None:
        """Begin a part of the demo."""

    def sent(self, request: Request) -> None:
        """A request went to `request.worker`; told again when it goes to another one."""

    def finished(self, request: Request) -> None:
        """A request was answered in full."""

    def died(self, death: Death) -> None:
        """A worker was killed, and its leases have ended."""

    def settled(self, death: Death) -> None:
        """All that died with the worker has been answered by others."""

    def pool(self, snapshot: Snapshot) -> None:
        """The service's state, some times a second."""

    def compared(self, request: Request, differences: Sequence[Difference]) -> None:
        """An answer of the shared run was compared with the unshared one."""

    def close(self) -> None:
        """Stop drawing; what was shown stays."""


class PlainView:
    """One line per event: for pipes, logs and CI."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._num_compared = 0

    def say(self, text: str) -> None:
        """Print the sentence."""
        self._line(text)

    def phase(self, number: int, title: str, explanation: str) -> None:
        """Print a heading."""
        self._line("")
        self._line(f"{number}. {title}")
        if explanation:
            self._line(f"   {explanation}")
        if number in (1, 2):
            self._line(heading())

    def sent(self, request: Request) -> None:
        """Nothing: the finished request says it all."""

    def finished(self, request: Request) -> None:
        """Print the request's ledger and time."""
        self._line(row(request))

    def died(self, death: Death) -> None:
        """Print what came back."""
        for line in obituary(death):
            self._line(f"   {line}")

    def settled(self, death: Death) -> None:
        """Nothing: the summary says it."""

    def pool(self, snapshot: Snapshot) -> None:
        """Nothing: the summary says what was used."""

    def compared(self, request: Request, differences: Sequence[Difference]) -> None:
        """Print differences, and a sign of life now and then."""
        self._num_compared += 1
        for difference in differences:
            self._line(f"   {difference}")
        if self._num_compared % 12 == 0:
            self._line(f"   {self._num_compared} answers compared")

    def close(self) -> None:
        """Nothing to stop."""

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


def heading() -> str:
    """Give the names of the columns of `row`."""
    return (
        f"{'at s':>7}  {'worker':<6} {'request':<24} {'prompt':>6} {'hit':>6} {'partial':>7} "
        f"{'joined':>6} {'cold':>6}  {'fate':<8} {'first token':>11}  answer"
    )


def row(request: Request) -> str:
    """Give one request as a line: its worker, its ledger, its time and how its answer begins."""
    ledger = request.ledger
    rest = len(request.prompt) - ledger.reused
    return (
        f"{request.done_s or 0:7.1f}  {request.worker:<6} {request.id:<24} "
        f"{len(request.prompt):>6,} {ledger.hit:>6,} {ledger.partial:>7,} {ledger.joined:>6,} "
        f"{rest:>6,}  {request.fate:<8} {request.ttft_ms:>8,.0f} ms  {opening(request.text)}"
    )


def opening(text: str, width: int = 48) -> str:
    r"""Give the first words of an answer on one line.

    >>> opening("You can\nreturn it.", width=12)
    'You can ret…'
    """
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def obituary(death: Death) -> list[str]:
    """Say in plain lines what the death of a worker cost, and whom."""
    when = " in mid-prefill" if death.in_prefill else ", too late to meet it in mid-prefill"
    lines = [
        f"{death.worker} (pid {death.pid}) was killed with SIGKILL{when}. After "
        f"{death.returned_ms:.0f} ms the service had ended its {many(death.leases, 'lease')} "
        f"and freed {many(death.blocks_returned, 'block')};",
        f"{many(death.blocks_kept, 'block')} with committed tokens stay cached for the others. "
        "The worker is not replaced.",
    ]
    if death.takeover_ms is not None:
        lines.append(
            f"{death.takeover_worker} was waiting for that prefix with {death.takeover_request}: "
            f"it took over {death.takeover_ms:.0f} ms after the kill."
        )
    if death.attempts:
        again = ", ".join(attempt.request for attempt in death.attempts)
        lost = sum(attempt.num_lost for attempt in death.attempts)
        lines.append(f"At most {lost} tokens of work died with it. Sent again, to others: {again}.")
    return lines


def request_table(requests: Sequence[Request], width: int) -> Table:
    """Lay requests out as a table; bars and answers only where there is room for them."""
    bar_width = 0 if width < 120 else 32 if width > 160 else 24
    table = Table(box=None, padding=(0, 1), header_style="dim", expand=True)
    for name in ("request", "worker"):
        table.add_column(name, no_wrap=True)
    for name in ("prompt", "hit", "partial", "joined", "cold"):
        table.add_column(name, justify="right", no_wrap=True)
    if bar_width:
        table.add_column("█ hit ▓ part ▒ join · cold", no_wrap=True, min_width=bar_width)
    table.add_column("fate", no_wrap=True)
    table.add_column("first token", justify="right", no_wrap=True)
    if width >= 100:
        table.add_column("answer", no_wrap=True, overflow="ellipsis", ratio=1)
    for request in requests:
        ledger = request.ledger
        counts = (len(request.prompt), ledger.hit, ledger.partial, ledger.joined)
        cells: list[str | Text] = [request.id, request.worker]
        cells += [f"{count:,}" for count in (*counts, counts[0] - ledger.reused)]
        if bar_width:
            cells.append(fate_bar(request, bar_width))
        cells += [Text(request.fate, style=STYLES[request.fate]), f"{request.ttft_ms:,.0f} ms"]
        if width >= 100:
            cells.append(opening(request.text))
        table.add_row(*cells)
    return table


def fate_bar(request: Request, width: int) -> Text:
    """Draw a prompt as a bar: what was hit, partial, joined, computed."""
    ledger = request.ledger
    parts = [
        (ledger.hit, "█", "green"),
        (ledger.partial, "▓", "green"),
        (ledger.joined, "▒", "yellow"),
        (len(request.prompt) - ledger.reused, "·", "blue"),
    ]
    bar = Text()
    for count, glyph, style in parts:
        if count:
            share = max(1, round(width * count / len(request.prompt)))
            bar.append(glyph * min(share, width - len(bar)), style=style)
    return bar
