"""`prefixcache stat`: the state of the service: a line a second, all of it, or since a mark."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixcache.cli import view
from prefixcache.plain_json import json_text
from prefixcache.texts import many
from prefixcache.types import Ledger, Snapshot

if TYPE_CHECKING:
    from prefixcache.cli.status import Status

HEAD_EVERY = 20
"""Rows after which the head is repeated."""


def stat(
    once: Annotated[
        bool,
        typer.Option("--once", help="All of the state, once; so does --json.", show_default=False),
    ] = False,
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", min=1, help="Rows to print; endless.", show_default=False),
    ] = None,
    interval: Annotated[
        float | None,
        typer.Option(
            "--interval",
            "-i",
            min=0.05,
            max=view.LONGEST_INTERVAL_S,
            metavar="SECONDS",
            help="Between rows; 1.",
            show_default=False,
        ),
    ] = None,
    mark: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Keep the counters under a name.", show_default=False),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What happened since that mark: this run.", show_default=False
        ),
    ] = None,
    connect: view.Connect = None,
    as_json: view.AsJson = False,
) -> None:
    """Show what the pool holds, and what becomes of the tokens: one line a second.

    With --json all of the state as one object, or, with --count or --interval, one object a row.
    Exit code 1 with --since: there is no such mark of this service.

    Example: prefixcache stat --mark before; ./my-run; prefixcache stat --since before
    """
    from prefixcache.cli import marks, status

    rest = {"--since": since, "--once": once, "--count": count, "--interval": interval}
    for option, given in (("--mark", mark), ("--since", since), ("--once", once)):
        rest.pop(option, None)
        if given:
            view.refuse_beside(option, rest)
    with view.open_client(connect) as client:
        if mark is not None:
            now = status.read(client)
            marks.keep(mark, now)
            told = {"mark": mark, **marks.counters(now)}
            _tell(told, f"{mark}: {status.sums(now.snapshot)}", as_json=as_json)
        elif since is not None:
            now = status.read(client)
            _print_since(since, marks.difference(since, now), now, as_json=as_json)
        elif once or (as_json and count is None and interval is None):
            now = status.read(client)
            if as_json:
                view.print_json(status.fields(now))
            else:
                status.show(now)
        else:
            rows(lambda: status.read(client), interval or 1.0, count, as_json=as_json)


def _tell(told: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        view.print_json(told)
    else:
        view.tell(text)


# ------------------------------------------------------------------------------------ one a second

Column = tuple[str, int, Callable[["Row"], str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What happened between two moments, and the state at the second."""

    seconds: float
    requests: int
    evicted: int
    ledger: Ledger
    now: Snapshot

    def per_s(self, number: float) -> str:
        """Write a number of this row per second."""
        each = number / self.seconds if self.seconds else 0.0
        return f"{each:,.0f}" if each >= 10 or not each else f"{each:.1f}"

    def share(self, number: int) -> str:
        """Write tokens as a share of this row's."""
        return f"{number / self.ledger.total:.1%}" if self.ledger.total else "-"

    def of_pool(self, number: int) -> str:
        """Write blocks as a share of the pool."""
        return f"{number / self.now.num_blocks:.0%}" if self.now.num_blocks else "-"


COLUMNS: tuple[Column, ...] = (
    ("req/s", 7, lambda row: row.per_s(row.requests)),
    ("tok/s", 9, lambda row: row.per_s(row.ledger.total)),
    ("hit", 6, lambda row: row.share(row.ledger.hit)),
    ("part", 6, lambda row: row.share(row.ledger.partial)),
    ("join", 6, lambda row: row.share(row.ledger.joined)),
    ("cold", 6, lambda row: row.share(row.ledger.cold)),
    ("gran", 6, lambda row: row.share(row.ledger.granularity)),
    ("evic", 6, lambda row: row.share(row.ledger.evicted)),
    ("free", 4, lambda row: row.of_pool(row.now.free)),
    ("priv", 4, lambda row: row.of_pool(row.now.private)),
    ("cach", 4, lambda row: row.of_pool(row.now.indexed)),
    ("quar", 4, lambda row: row.of_pool(row.now.quarantined)),
    ("lease", 6, lambda row: f"{row.now.num_leases:,}"),
    ("wait", 5, lambda row: f"{row.now.waiting:,}"),
    ("evict/s", 8, lambda row: row.per_s(row.evicted)),
)
"""Heads, widths, and what stands below: first rates, then shares of tokens, of blocks, counts."""


def rows(
    read: Callable[[], Status], interval_s: float, count: int | None, *, as_json: bool
) -> None:
    """Print a row for each interval until Ctrl-C; the first is since the start of the service."""
    earlier, seen_at, printed = None, 0.0, 0
    try:
        while count is None or printed < count:
            if printed:
                time.sleep(max(0.0, seen_at + interval_s - time.monotonic()))
            now, seen_at, before_at = read(), time.monotonic(), seen_at
            if earlier is None:
                row = difference(None, now.snapshot, now.info.uptime_s)
            else:
                row = difference(earlier, now.snapshot, seen_at - before_at)
            earlier = now.snapshot
            if as_json:
                view.tell(json_text(row_fields(row)))
            else:
                if printed % HEAD_EVERY == 0:
                    view.tell(_line([head for head, _, _ in COLUMNS]))
                view.tell(_line([write(row) for _, _, write in COLUMNS]))
            printed += 1
    except KeyboardInterrupt:
        return


def difference(earlier: Snapshot | None, now: Snapshot, seconds: float) -> Row:
    """Say what happened from one snapshot to another; from the start, if there is no earlier."""
    if earlier is None or earlier.requests > now.requests:  # or the service was restarted
        return Row(seconds, now.requests, now.evicted, now.ledger, now)
    return Row(
        seconds,
        now.requests - earlier.requests,
        now.evicted - earlier.evicted,
        subtract(now.ledger, earlier.ledger),
        now,
    )


def subtract(now: Ledger, earlier: Ledger) -> Ledger:
    """Say what was added to a ledger."""
    return Ledger(**{fate: getattr(now, fate) - getattr(earlier, fate) for fate in view.FATES})


def row_fields(row: Row) -> dict[str, Any]:
    """Give a row as plain values."""
    now = row.now
    states = ("num_blocks", "free", "private", "indexed", "quarantined", "waiting")
    return {
        "seconds": row.seconds,
        "requests": row.requests,
        "evicted_blocks": row.evicted,
        "ledger": view.ledger_fields(row.ledger),
        **{name: getattr(now, name) for name in states},
        "leases": now.num_leases,
    }


def _line(cells: Sequence[str]) -> str:
    """Write cells in columns, as many as the terminal has room for."""
    line, room = "", view.width()
    for (_, columns, _), cell in zip(COLUMNS, cells, strict=True):
        wider = f"{line} {cell:>{columns}}" if line else f"{cell:>{columns}}"
        if len(wider) > room:
            break
        line = wider
    return line


# ------------------------------------------------------------------------------------ since a mark


def _print_since(name: str, told: dict[str, Any], now: Status, *, as_json: bool) -> None:
    from prefixcache.cli import memory

    ledger = Ledger(**{fate: told["ledger"][fate] for fate in view.FATES})
    told["reused"] = ledger.hit_rate if ledger.total else None
    steps = [(blocks, tokens) for blocks, tokens in told["shortage"]]
    if as_json:
        view.print_json({"since": name} | told)
        return
    view.tell(
        f"since {name}, {view.show_idle(told['seconds'])} ago: "
        f"{many(told['requests'], 'request')}, "
        f"{many(ledger.total, 'token')}, {many(told['evicted_blocks'], 'block')} evicted"
    )
    if ledger.total:
        view.show(
            view.bar([(fate, getattr(ledger, fate)) for fate in view.FATES], min(view.width(), 100))
        )
        view.tell(f"{ledger.hit_rate:.2%} reused: {view.show_ledger(ledger)}")
    for line in memory.lines(steps, ledger.evicted, now):
        view.tell(line)
