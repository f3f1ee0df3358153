"""Two faces of every answer: lines for people, JSON with the same fields for programs."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixcache.errors import InvalidRequest
from prefixcache.plain_json import json_text
from prefixcache.texts import escape, many
from prefixcache.types import HoldingInfo, Ledger, Namespace, QuotaInfo, Snapshot

if TYPE_CHECKING:
    from rich.text import Text

    from prefixcache.client import Client

STALLED_AFTER_S = 30.0
"""A worker that makes no step, or takes nothing, for so long is stuck."""
_MOST_NAMES = 20
_LONGEST_NAME = 80
"""Of the namespaces in a message: a service may know thousands, each of a kilobyte."""
LONGEST_INTERVAL_S = 86_400.0
"""Between two looks; the clock takes no endless pause."""

LARGEST_SEQUENCE = 2**64 - 1
"""Of events: what the wire carries."""

Connect = Annotated[
    str | None,
    typer.Option(
        "--connect",
        "-c",
        metavar="ADDRESS",
        help="Where the service listens: unix:PATH or host:port. Default: $PREFIXCACHE_TARGET, "
        "else the default socket.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Model of the namespace. Default: the only namespace there is.",
        show_default=False,
    ),
]
Adapter = Annotated[str, typer.Option(metavar="NAME", help="Adapter.", show_default=False)]
Tenant = Annotated[str, typer.Option(metavar="NAME", help="Tenant.", show_default=False)]
Salt = Annotated[str, typer.Option(metavar="TEXT", help="Salt.", show_default=False)]

PIPE_WIDTH = 160
"""Columns of a line where there is no terminal to ask."""
MIN_WIDTH = 20

FATES = (
    *("hit", "restored", "partial", "joined", "approximate"),
    *("cold", "evicted", "granularity", "resumed"),
)


def open_client(target: str | None) -> Client:
    """Connect, for one question."""
    from prefixcache.client import connect  # here, as rich below, so that help needs neither

    return connect(target, timeout_s=10.0)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The namespace that the options name, if they do."""

    model: str | None
    adapter: str
    tenant: str
    salt: str

    def named(self) -> Namespace | None:
        """Give the namespace if it is named in full; None if it is left to the service.

        Raises:
            InvalidRequest: the model is an empty text, which is no name.
        """
        if self.model is None:
            return None
        if not self.model:
            raise InvalidRequest("--model is empty; give a name, or leave the option out")
        return Namespace(self.model, self.adapter, self.tenant, self.salt)

    def named_or_all(self, option: str = "--model") -> Namespace | None:
        """Give the namespace that is named in full, or None for all of them.

        Raises:
            InvalidRequest: a part of it is named, and `option`, for the model, is not.
        """
        if self.model is None:
            parts = {"--adapter": self.adapter, "--tenant": self.tenant, "--salt": self.salt}
            if given := [name for name, value in parts.items() if value]:
                raise InvalidRequest(
                    f"{' and '.join(given)} alone names no namespace: give {option} as well"
                )
        return self.named()

    def choose(self, snapshot: Snapshot) -> Namespace:
        """Give the named one, or the only one that fits what is named and that the service knows.

        Raises:
            InvalidRequest: there is not exactly one; the message lists them.
        """
        if named := self.named():
            return named
        known = list(snapshot.namespaces)
        fits = [
            one
            for one in known
            if self.adapter in ("", one.adapter)
            and self.tenant in ("", one.tenant)
            and one.salt == self.salt
        ]
        if len(fits) == 1:
            return fits[0]
        if len(known) == 1 and not (self.adapter or self.tenant or self.salt):
            return known[0]
        names = sorted(show_namespace(one) for one in known)
        shown = [
            name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
            for name in names[:_MOST_NAMES]
        ]
        num_more = snapshot.num_namespaces - len(shown)
        more = f" and {num_more:,} more" if num_more > 0 else ""
        raise InvalidRequest(
            "name a namespace with --model; the service knows: "
            f"{', '.join(shown) or 'none yet'}{more}"
        )

    def of_folder(self, folder: Path, snapshot: Snapshot) -> Chosen:
        """Give what is meant if the model is named by its folder: that which is attached as it."""
        name = folder.resolve().name
        found = {one.model for one in snapshot.namespaces if one.model.partition("@")[0] == name}
        return replace(self, model=found.pop() if len(found) == 1 else None)


def refuse_beside(option: str, others: Mapping[str, object]) -> None:
    """Refuse what would not be read beside an option.

    Args:
        option: what was given.
        others: by name, what it leaves without a meaning; empty values were not given.

    Raises:
        InvalidRequest: one of them was given.

    >>> refuse_beside("--all", {"--model": None, "--tenant": "acme"})
    Traceback (most recent call last):
    prefixcache.errors.InvalidRequest: --all leaves no meaning to --tenant: give one or the other
    """
    if given := [name for name, value in others.items() if value not in (None, "", False, [])]:
        raise InvalidRequest(
            f"{option} leaves no meaning to {' and '.join(given)}: give one or the other"
        )


def choose_namespace(
    client: Client, model: str | None, adapter: str, tenant: str, salt: str
) -> Namespace:
    """Give the namespace that the options name, or the only one that the service knows.

    Raises:
        InvalidRequest: none is named, and there is not exactly one; the message lists them.
    """
    chosen = Chosen(model, adapter, tenant, salt)
    return chosen.named() or chosen.choose(client.snapshot())


def show_namespace(namespace: Namespace) -> str:
    """Name a namespace for people; a salt is a secret, so only that there is one."""
    shown = Namespace(namespace.model, namespace.adapter, namespace.tenant)
    return f"{shown} (salted)" if namespace.salt else str(shown)


def quota_fields(info: QuotaInfo, block_size: int) -> dict[str, Any]:
    """Give the fields of a quota, without the salt of its namespace."""
    space = None if info.namespace is None else namespace_fields(info.namespace)
    return asdict(info) | {"namespace": space, "num_held_tokens": info.num_held * block_size}


def show_holding(info: HoldingInfo) -> str:
    """Write what a tenant has below the pool, and what is kept for it."""
    parts = [f"{many(info.host + info.disk, 'block')} below the pool"]
    if info.host and info.disk:
        parts.append(f"{info.host:,} in memory")
    kept = f"{info.kept:,} kept for it"
    if info.disk and info.host_kept:
        kept += f", {info.host_kept:,} in memory"
    return " · ".join([*parts, kept] if info.kept else parts)


def ledger_fields(ledger: Ledger) -> dict[str, int]:
    """Give the fields of a ledger in the order in which they are shown."""
    return {fate: getattr(ledger, fate) for fate in FATES} | {"total": ledger.total}


def namespace_fields(namespace: Namespace) -> dict[str, Any]:
    """Give the fields of a namespace, without its salt; `approximate` where it is."""
    fields = namespace._asdict()
    fields["salted"] = bool(fields.pop("salt"))
    if not namespace.approximate:
        del fields["approximate"]
    return fields


def show_ledger(ledger: Ledger) -> str:
    """Write a ledger for people; the shares are of tokens, and those shown add up to 100 %."""
    if not ledger.total:
        return "no tokens yet"
    parts = [
        f"{fate} {getattr(ledger, fate):,} ({getattr(ledger, fate) / ledger.total:.1%})"
        for fate in FATES
        if getattr(ledger, fate)
    ]
    return " · ".join(parts)


def width() -> int:
    """Give the columns of the terminal; in a pipe as many as a line may need."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return PIPE_WIDTH
    return max(MIN_WIDTH, shutil.get_terminal_size((80, 24)).columns)


def cut(line: str, columns: int) -> str:
    """Cut a line to the width of the terminal; what is cut off shows as an ellipsis."""
    from rich.cells import cell_len, set_cell_size

    line = escape(line.rstrip())
    return line if cell_len(line) <= columns else set_cell_size(line, columns - 1).rstrip() + "…"


def show_idle(seconds: float | None) -> str:
    """Write a duration in at most five characters.

    >>> [show_idle(s) for s in (0.2, 59, 3600, 1e6, None)]
    ['0 s', '59 s', '60 m', '278 h', '-']
    """
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} m" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def show_progress(worker: Any) -> str:
    """Say what a worker (a message `WorkerInfo`) does with its requests; nothing if it has none.

    >>> from prefixcache.v1.prefixcache_pb2 import WorkerInfo
    >>> show_progress(WorkerInfo(in_hand=2, stalled_s=1, untaken=3, oldest_untaken_s=9))
    '2 in hand, last step 1 s ago; 3 untaken, the oldest for 9 s'
    """
    parts = []
    if worker.in_hand:
        parts.append(f"{worker.in_hand:,} in hand, last step {show_idle(worker.stalled_s)} ago")
    if worker.untaken:
        oldest = show_idle(worker.oldest_untaken_s)
        parts.append(f"{worker.untaken:,} untaken, the oldest for {oldest}")
    return "; ".join(parts)


def tell(text: str = "") -> None:
    """Print lines.  Whatever names in them say, they stay these lines."""
    typer.echo("\n".join(map(escape, text.split("\n"))))


def print_json(fields: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    typer.echo(json_text(fields, indent=2, ensure_ascii=False))


def print_table(rows: Iterable[Sequence[str]], *, indent: str = "", align: str = "") -> None:
    """Print rows in columns, as plain lines that also read well in a pipe.

    Args:
        rows: as many cells each.
        indent: before each row.
        align: `<` or `>` for each column; all to the left, if empty.
    """
    from rich.cells import cell_len, set_cell_size

    table = [tuple(map(escape, row)) for row in rows]
    if not table:
        return
    widths = [max(cell_len(cell) for cell in column) for column in zip(*table, strict=True)]
    aligned = align or "<" * len(widths)
    for row in table:
        cells = [
            " " * (width - cell_len(cell)) * (side == ">") + set_cell_size(cell, width)
            if side == "<"
            else " " * (width - cell_len(cell)) + cell
            for cell, width, side in zip(row, widths, aligned, strict=False)
        ]
        typer.echo((indent + "  ".join(cells)).rstrip())


GLYPHS = {
    "hit": "█",
    "partial": "▓",
    "joined": "▒",
    "granularity": "▫",
    "evicted": "░",
    "cold": "·",
    "resumed": "◦",
    "approximate": "≈",
    "restored": "▀",
}
"""Fates in bars; colour only repeats what they say."""
_STYLES = {
    "hit": "green",
    "partial": "green",
    "joined": "yellow",
    "granularity": "magenta",
    "evicted": "red",
    "cold": "blue",
    "resumed": "cyan",
    "approximate": "yellow",
    "restored": "green",
}


def bar(parts: Sequence[tuple[str, int]], columns: int) -> Text:
    """Draw fates as a bar; a part that is not empty has at least one column."""
    from rich.text import Text

    total = sum(count for _, count in parts) or 1
    text, drawn, seen = Text(), 0, 0
    left = sum(1 for _, count in parts if count)
    for fate, count in parts:
        if not count:
            continue
        left -= 1
        seen += count
        cells = max(1, min(round(seen / total * columns) - drawn, columns - drawn - left))
        drawn += cells
        text.append(GLYPHS[fate] * cells, style=_STYLES[fate])
    return text


def show(text: Text) -> None:
    """Print text, in colour where that is wanted: in a terminal, without NO_COLOR."""
    from rich.cells import cell_len
    from rich.console import Console

    Console(width=max(width(), cell_len(text.plain)), highlight=False).print(text)


def wrap(text: str, indent: str = "  ") -> list[str]:
    """Break text into lines as wide as the terminal, at most 100 columns; indent all but one."""
    return textwrap.wrap(
        text,
        min(width(), 100),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
