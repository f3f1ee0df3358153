"""`prefixcache top`: the service live, on a whole screen."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefixcache.cli import decoder as decoding
from prefixcache.cli import stat, view
from prefixcache.errors import InvalidRequest, NotFound, ServiceUnavailable
from prefixcache.outline import Order
from prefixcache.plain_json import json_text

if TYPE_CHECKING:
    from rich.console import Console

    from prefixcache.cli.top_screen import Screen
    from prefixcache.client import Client

_TREE_EVERY_S = 2.0
"""The trees are walked less often than the numbers are read."""
_HOTTEST = 60
"""Branches that are asked for."""


def top(
    interval: Annotated[
        float,
        typer.Option(
            "--interval",
            "-i",
            min=0.1,
            max=view.LONGEST_INTERVAL_S,
            metavar="SECONDS",
            help="Between looks.",
        ),
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Show it once, as plain lines.", show_default=False)
    ] = False,
    sort: Annotated[
        Order, typer.Option(help="Prefixes: what was used last first, or the largest.")
    ] = Order.HEAT,
    svg: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw one screen as a picture.", show_default=False),
    ] = None,
    front: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Of `prefixcache up`: show its workers, too.  A key is taken from "
            "$OPENAI_API_KEY.",
            show_default=False,
        ),
    ] = None,
    tokenizer: decoding.TokenizerPath = None,
    connect: view.Connect = None,
    as_json: view.AsJson = False,
) -> None:
    """Watch the service: pool, ledger, requests, prefixes, leases, flights and workers.

    Keys: q ends, p pauses, s sorts the prefixes the other way.  In a pipe: the lines of `stat`.

    Example: prefixcache top --tokenizer /models/my-model
    """
    from prefixcache.cli import status, top_screen
    from prefixcache.cli.front import read_front_address

    if svg is not None:
        view.refuse_beside("--svg", {"--json": as_json})
    with view.open_client(connect) as client:
        shown = top_screen.Screen(tokenizer, sort)
        shown.front_address = None if front is None else read_front_address(front)
        if once or svg is not None:
            _look(client, shown)
            if as_json:
                view.print_json(shown.fields())
            elif svg is not None:
                _draw(shown, svg)
            else:
                _console().print(shown.render(view.width(), None))
        elif as_json:
            _tell(client, shown, interval)
        elif sys.stdout.isatty():
            _watch(client, shown, interval)
        else:
            stat.rows(lambda: status.read(client), interval, None, as_json=False)


def _console() -> Console:
    from rich.console import Console

    return Console(width=view.width(), highlight=False)


def _look(client: Client, shown: Screen) -> None:
    """Read the numbers, and the trees if it is time for that."""
    from prefixcache.cli import status

    shown.take(status.read(client), time.monotonic())
    if shown.front_address is not None:
        from prefixcache.cli.front import read_front

        shown.front = None  # what it once said is not what it says
        shown.front = read_front(shown.front_address)
    if shown.wants_trees(_TREE_EVERY_S):
        try:
            shown.outline = client.outline(
                order=shown.order, max_branches=_HOTTEST, max_depth=3, ghosts=False
            )
        except NotFound:
            shown.outline = None  # no layout yet: nothing is stored


def _tell(client: Client, shown: Screen, interval_s: float) -> None:
    try:
        while True:
            _look(client, shown)
            view.tell(json_text(shown.fields(), ensure_ascii=False))
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return


def _draw(shown: Screen, path: Path) -> None:
    from rich.console import Console

    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    console.print(shown.render(110, None))
    try:
        path.write_text(console.export_svg(title="prefixcache top"), encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}") from None
    view.tell(f"{path}: one screen")


def _watch(client: Client, shown: Screen, interval_s: float) -> None:
    """Show it until q or Ctrl-C; a service that does not answer is waited for."""
    from rich.live import Live

    from prefixcache.cli import keypress

    console = _console_of_terminal()
    try:
        with (
            keypress.pressed() as pressed,
            Live(console=console, screen=True, auto_refresh=False) as live,
        ):
            due = 0.0
            while True:
                if time.monotonic() >= due and not shown.paused:
                    due = time.monotonic() + interval_s
                    _try(client, shown)
                live.update(shown.render(console.width, console.height), refresh=True)
                key = pressed.wait(max(0.05, min(interval_s, due - time.monotonic())))
                if key == "q":
                    return
                if key == "p":
                    shown.paused = not shown.paused
                elif key == "s":
                    shown.turn()
                    due = 0.0
    except KeyboardInterrupt:
        return


def _console_of_terminal() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _try(client: Client, shown: Screen) -> None:
    try:
        _look(client, shown)
        shown.trouble = ""
    except ServiceUnavailable as error:
        shown.trouble = str(error).partition(". ")[0]
