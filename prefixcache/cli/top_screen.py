"""The screen of `top`: what is read becomes lines, as many as fit.

```
┌ how it runs ─────────────────────────────────────────────┐
│ pool     ███████████▓▓▒        free · cached · pinned … │   states of the pool
│ tokens   ██████████▓▓░··       hit · partial …          │   the last minute
│ verbs    acquire 120/s  p50 0.2 ms  p99 1.1 ms           │
│ front    w1 ready 3 of 16 answers  41.2 tokens/s         │   with --front
│ prefixes ▇ 12,400  now  ● "You are a …"                  │   hottest or largest
│ leases, flights, workers                                 │   who holds what, for how long
└──────────────────────────────────────────────────────────┘
```
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from prefixcache.cli import decoder as decoding
from prefixcache.cli import stat, status, tree, view
from prefixcache.cli.status import Status
from prefixcache.client.address import Address
from prefixcache.outline import Branch, Order, Outline
from prefixcache.texts import is_plain, many
from prefixcache.types import Ledger, Namespace

WINDOW_S = 60.0
"""The ledger is that of so many seconds."""

STATES = (
    ("cached", "█", "green"),
    ("pinned", "◆", "cyan"),
    ("private", "▓", "yellow"),
    ("quarantined", "✕", "red"),
    ("free", "·", "dim"),
)
"""States of a block, their glyphs and colours; a colour only repeats what the glyph says."""

_KEYS = "q ends · p pauses · s sorts"
_MOST_PREFIXES = 24
_LABEL = 9
"""Columns of the labels at the left."""


class Screen:
    """What was read, and how it looks.

    Args:
        tokenizer: To show text; None: that of the model, if it is at hand.
        order: Which prefixes come first.
    """

    def __init__(self, tokenizer: Path | None, order: Order) -> None:
        self.order = order
        self.paused = False
        self.trouble = ""
        """Why the service does not answer; empty if it does."""
        self.outline: Outline | None = None
        self.front_address: Address | None = None
        self.front: dict[str, Any] | None = None
        """What the front said of its workers; None: it was not asked."""
        self._tokenizer = tokenizer
        self._readers: dict[Namespace, decoding.Decoder | None] = {}
        self._now: Status | None = None
        self._past: deque[tuple[float, Status]] = deque()
        self._trees_at: float | None = None

    def take(self, now: Status, at: float) -> None:
        """Take what was read at a moment."""
        self._now = now
        if self._past and self._past[-1][1].info.pid != now.info.pid:
            self._past.clear()  # the service was restarted
        self._past.append((at, now))
        while len(self._past) > 2 and self._past[1][0] <= at - WINDOW_S:
            self._past.popleft()

    def wants_trees(self, every_s: float) -> bool:
        """Whether it is time to look at the trees again."""
        at = self._past[-1][0]
        if self._trees_at is not None and at - self._trees_at < every_s:
            return False
        self._trees_at = at
        return True

    def turn(self) -> None:
        """Sort the prefixes the other way."""
        self.order = Order.TOKENS if self.order is Order.HEAT else Order.HEAT
        self._trees_at = None

    # ---------------------------------------------------------------------------------- numbers

    def _recent(self) -> stat.Row:
        """Give what happened in the window; since the start of the service, on the first look."""
        assert self._now is not None
        (then, first), (at, now) = self._past[0], self._past[-1]
        if first is now:
            return stat.difference(None, now.snapshot, now.info.uptime_s)
        return stat.difference(first.snapshot, now.snapshot, at - then)

    def blocks(self) -> dict[str, int]:
        """Give the pool by state; pinned blocks are not counted as cached once more."""
        assert self._now is not None
        snapshot = self._now.snapshot
        pinned = snapshot.pinned
        return {
            "cached": snapshot.indexed - pinned,
            "pinned": pinned,
            "private": snapshot.private,
            "quarantined": snapshot.quarantined,
            "free": snapshot.free + snapshot.leaving,
        }

    def hottest(self) -> list[tuple[Namespace, Branch]]:
        """Give the prefixes that are shown, the first ones first."""
        if self.outline is None:
            return []
        found = [
            (part.namespace, branch)
            for part in self.outline.namespaces
            for branch in part.branches
            if branch.depth
        ]
        if self.order is Order.TOKENS:
            return sorted(found, key=lambda one: -one[1].below.tokens)
        return sorted(
            found, key=lambda one: (one[1].num_locks == 0, -one[1].heat, -one[1].below.tokens)
        )

    def fields(self) -> dict[str, Any]:
        """Give all that is shown as plain values."""
        assert self._now is not None
        recent = self._recent()
        return (
            status.fields(self._now)
            | {
                "blocks": self.blocks(),
                "window_s": recent.seconds,
                "recent": stat.row_fields(recent),
                "flights": [
                    {
                        "lease": flight.lease,
                        "worker": flight.worker,
                        "num_tokens": flight.num_tokens,
                        "num_committed": flight.num_committed,
                        "num_waiting": flight.num_waiting,
                    }
                    for flight in self._now.message.flights
                ],
                "prefixes": [
                    view.namespace_fields(namespace)
                    | {
                        "num_tokens": branch.below.tokens,
                        "num_blocks": branch.below.blocks,
                        "heat": branch.heat,
                        "idle_s": branch.idle_s,
                        "num_locks": branch.num_locks,
                        "text": decoding.preview(self._reader(namespace), branch.tokens, 80),
                    }
                    for namespace, branch in self.hottest()[:20]
                ],
            }
            | ({} if self.front is None else {"front": self.front})
        )

    # ------------------------------------------------------------------------------------ lines

    def render(self, width: int, height: int | None) -> Group:
        """Write the screen, at most `height` lines of it."""
        if self._now is None:
            return Group(_cut(Text(self.trouble or "…"), width))
        small = height is not None and height < 30
        is_live = height is not None
        head = list(self._head(self._now, width, 1 if small else 4, is_live=is_live))[:height]
        lists = [
            list(self.rows_of_front()),
            list(self._prefixes(width)),
            list(self._leases(self._now, width)),
            list(self._flights(self._now, width)),
            list(self._workers(self._now, width)),
        ]
        room = None if height is None else max(0, height - len(head))
        return Group(*(_cut(line, width) for line in (*head, *_fit(lists, room))))

    def _head(self, now: Status, width: int, most_verbs: int, *, is_live: bool) -> Iterator[Text]:
        snapshot, info = now.snapshot, now.info
        state = "draining" if info.draining else "serving"
        title = Text(f"prefixcache · {state} {view.show_idle(info.uptime_s)}", style="bold")
        title.append(
            f" · {many(snapshot.num_blocks, 'block')} of {snapshot.block_size} · {info.policy}",
            style="not bold",
        )
        yield title
        if self.trouble:
            yield Text(f"no answer: {self.trouble}", style="bold red")
        elif self.paused:
            yield Text("paused: p goes on", style="bold yellow")
        elif is_live:
            yield Text(_KEYS, style="dim")
        columns = max(8, min(60, width - _LABEL))
        yield _label("pool").append(_states(self.blocks(), columns))
        total = max(1, snapshot.num_blocks)
        yield from _legend(
            [
                (f"{glyph} {name}", f"{count:,} {count / total:.0%}")
                for name, glyph, _ in STATES
                if (count := self.blocks()[name]) or name in ("cached", "private", "free")
            ],
            width,
        )
        for number, line in enumerate(status.tiers(snapshot)):
            yield _label("" if number else "below").append(line)
        recent = self._recent()
        yield _label("tokens").append(
            view.bar([(fate, getattr(recent.ledger, fate)) for fate in view.FATES], columns)
            if recent.ledger.total
            else Text("none", style="dim")
        )
        yield from _legend(_fates(recent.ledger), width)
        yield (
            _label("")
            .append(f"{_span(recent.seconds)}: {many(recent.requests, 'request')}, ")
            .append(
                f"{recent.per_s(recent.ledger.total)} tokens/s, {recent.per_s(recent.evicted)} "
                f"blocks evicted/s, {snapshot.waiting:,} waiting",
            )
        )
        yield from list(self._verbs(now, width))[: most_verbs + 1]

    def _verbs(self, now: Status, width: int) -> Iterator[Text]:
        parts = []
        for verb in sorted(now.message.verbs, key=lambda one: -one.count):
            if not verb.HasField("p50_s"):
                continue
            times = f"{_ms(verb.p50_s)} / {_ms(verb.p99_s)}"
            parts.append((verb.verb, f"{verb.per_s:,.1f}/s {times}"))
        if parts:
            yield _label("verbs").append("each second, p50 / p99 ms", style="dim")
            yield from _legend(parts, width)

    def _reader(self, namespace: Namespace) -> decoding.Decoder | None:
        if namespace not in self._readers:
            self._readers[namespace] = decoding.open_decoder(self._tokenizer, namespace)
        return self._readers[namespace]

    def _prefixes(self, width: int) -> Iterator[Text]:
        found = self.hottest()
        name = "hottest" if self.order is Order.HEAT else "largest"
        yield Text(f"{name} prefixes", style="bold")
        for namespace, branch in found[:_MOST_PREFIXES]:
            row = f"  {branch.below.tokens:>9,} {tree.glyph(branch)} "
            row += f"{'now' if branch.num_locks else view.show_idle(branch.idle_s):>5} "
            row += f"{'●' if branch.num_locks else ' '} "
            room = width - len(row)
            yield Text(row + decoding.preview(self._reader(namespace), branch.tokens, room))

    def rows_of_front(self) -> Iterator[Text]:
        """Write the front's workers, a row each; nothing if it was not asked."""
        if (front := self.front) is None:
            return
        yield Text(
            f"front: {front['tokens_per_s']:,.1f} tokens/s, {front['waiting']:,} of "
            f"{front['longest_queue']:,} wait, {front['moved']:,} went on elsewhere"
            + (", draining" if front["is_draining"] else ""),
            style="bold",
        )
        for one in front["workers"]:
            text = f"  {one['worker']:<14} {one['state']:<9}"
            if one["state"] == "starting":
                yield Text(text, style="yellow")
                continue
            text += f" {one['running']:>3,} of {one['seats']:,} answers"
            text += f" {one['tokens_per_s']:>8,.1f} tokens/s  pid {one['pid']}"
            yield Text(text, style="" if one["state"] == "ready" else "bold red")

    def _leases(self, now: Status, width: int) -> Iterator[Text]:
        leases = now.snapshot.leases
        yield Text(f"leases: {now.snapshot.num_leases:,}", style="bold")
        for lease in sorted(leases, key=lambda one: one.expires_in_s):
            name = f"{lease.worker}#{lease.lease}"
            yield Text(
                f"  {name:<14} {lease.num_committed:>8,} of {lease.num_tokens:>7,} tokens "
                f"{lease.num_blocks:>6,} blocks  ends in {lease.expires_in_s:.0f} s"
            )

    def _flights(self, now: Status, width: int) -> Iterator[Text]:
        flights = now.message.flights
        yield Text(f"being computed: {len(flights):,}", style="bold")
        for flight in sorted(flights, key=lambda one: -one.num_waiting):
            name = f"{flight.worker}#{flight.lease}"
            done = flight.num_committed / max(1, flight.num_tokens)
            yield Text(
                f"  {name:<14} {_gauge(done)} {flight.num_committed:>7,} of "
                f"{flight.num_tokens:>7,} tokens  {flight.num_waiting:,} waiting"
            )

    def _workers(self, now: Status, width: int) -> Iterator[Text]:
        workers = list(now.workers)
        attached = sum(one.state == "attached" for one in workers)
        yield Text(f"workers: {attached:,} attached", style="bold")
        order = {"lost": 0, "died": 1, "attached": 2, "left": 3}
        for one in sorted(workers, key=lambda one: (order.get(one.state, 9), one.since_s)):
            style = {"lost": "bold red", "died": "red", "left": "dim"}.get(one.state, "")
            text = f"  {one.worker:<14} {one.state:<8} {view.show_idle(one.since_s):>5}"
            text += f"  pid {one.pid}" if one.pid else ""
            text += f"  {many(one.leases, 'lease')}" if one.leases else ""
            if progress := view.show_progress(one):
                text += f"  {progress}"
            if max(one.stalled_s, one.oldest_untaken_s) > view.STALLED_AFTER_S:
                text, style = f"{text}: stuck", "bold red"
            yield Text(text, style=style)


def _fit(lists: Sequence[list[Text]], room: int | None) -> Iterator[Text]:
    """Share the lines among lists; what does not fit is counted in each one's last line."""
    sizes = [len(one) for one in lists]
    if room is not None:
        fair = [0] * len(lists)
        while room > 0 and fair != sizes:
            for index, size in enumerate(sizes):
                if fair[index] < size and room > 0:
                    fair[index] += 1
                    room -= 1
        sizes = fair
    for one, size in zip(lists, sizes, strict=True):
        left = len(one) - size
        if left and size > 1:
            yield from one[: size - 1]
            yield Text(f"  … {left + 1:,} more", style="dim")
        else:
            yield from one[:size]


def _label(name: str) -> Text:
    return Text.assemble((f"{name:<{_LABEL}}", "bold"))


def _states(blocks: dict[str, int], columns: int) -> Text:
    total = sum(blocks.values())
    text, seen, drawn = Text(), 0, 0
    for name, glyph, style in STATES:
        seen += blocks[name]
        cells = round(seen / max(1, total) * columns) - drawn
        cells = max(cells, int(blocks[name] > 0 and drawn < columns))
        text.append(glyph * cells, style=style)
        drawn += cells
    return text


def _legend(parts: Sequence[tuple[str, str]], width: int) -> Iterator[Text]:
    """Write names and numbers side by side, on as many lines as they need."""
    line = ""
    for name, number in parts:
        cell = f"{name} {number}"
        if line and _LABEL + len(line) + 3 + len(cell) > width:
            yield Text(" " * _LABEL + line)
            line = ""
        line = f"{line}   {cell}" if line else cell
    if line:
        yield Text(" " * _LABEL + line)


def _fates(ledger: Ledger) -> list[tuple[str, str]]:
    return [
        (f"{view.GLYPHS[fate]} {fate}", f"{getattr(ledger, fate) / ledger.total:.1%}")
        for fate in view.FATES
        if getattr(ledger, fate)
    ]


def _span(seconds: float) -> str:
    return f"last {seconds:.0f} s" if seconds <= WINDOW_S * 1.5 else "since the start"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.01 else f"{seconds * 1e3:.0f}"


def _gauge(share: float) -> str:
    done = round(share * 10)
    return "█" * done + "·" * (10 - done)


def _cut(line: Text, width: int) -> Text:
    if not is_plain(line.plain):  # one sign for one, so that the colours stay where they are
        line.plain = "".join(
            char if is_plain(char) else "\N{REPLACEMENT CHARACTER}" for char in line.plain
        )
    line.truncate(width, overflow="ellipsis")
    line.no_wrap = True
    return line
