"""`prefixcache doctor`: is everything as it should be, and if not, what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer

from prefixcache.cli import view
from prefixcache.errors import NotFound
from prefixcache.outline import Order, Outline

if TYPE_CHECKING:
    from prefixcache.cli.checks import Finding, Times
    from prefixcache.cli.status import Status
    from prefixcache.client import Client
    from prefixcache.types import Checked

_EVERY_RUN = 1 << 40
_LOOKS = 5
"""Answers that are timed."""
_BETWEEN_S = 0.1
_HEADS = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}


def doctor(
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Check every invariant in one go and leave none out; everybody waits meanwhile.",
            show_default=False,
        ),
    ] = False,
    stalled_after: Annotated[
        float,
        typer.Option(
            "--stalled-after",
            min=0,
            help="Seconds without a step, or with a request that it does not take, after which a "
            "worker is stuck.",
        ),
    ] = view.STALLED_AFTER_S,
    connect: view.Connect = None,
    as_json: view.AsJson = False,
) -> None:
    """Look the service over: each finding with what it means, and what to do.

    Exit code 1: something is wrong.

    Example: prefixcache doctor
    """
    with view.open_client(connect) as client:
        found = list(_look(client, deep=deep, stalled_after_s=stalled_after))
    wrong = sum(one.level == "wrong" for one in found)
    if as_json:
        view.print_json({"wrong": wrong, "findings": [asdict(one) for one in found]})
    else:
        for one in found:
            _print(one)
        notes = sum(one.level == "note" for one in found)
        view.tell(f"{wrong:,} wrong, {notes:,} to note." if wrong or notes else "All is well.")
    if wrong:
        raise typer.Exit(1)


def _look(client: Client, *, deep: bool, stalled_after_s: float) -> Iterator[Finding]:
    from prefixcache.cli import checks

    now, times = _time(client)
    outline = _outline(client)
    return chain(
        checks.versions(now),
        checks.core(now),
        checks.invariants(_check(client, deep=deep)),
        checks.sizes(now),
        checks.ledger(now),
        checks.partings(now, outline),
        checks.workers(now),
        checks.progress(now, stalled_after_s),
        checks.clocks(times),
        checks.shared_memory(now),
        checks.tier(now),
        checks.remote(now),
        checks.disk(now),
        checks.state(now),
        checks.failures(now),
    )


def _time(client: Client) -> tuple[Status, Times]:
    """Read the status some times, and the clocks with it."""
    from prefixcache.cli import checks, status

    took = []
    first = last = status.read(client)
    begun = ended = time.monotonic()
    for _ in range(_LOOKS):
        time.sleep(_BETWEEN_S)
        asked = time.monotonic()
        last = status.read(client)
        ended = time.monotonic()
        took.append(ended - asked)
    theirs = last.info.uptime_s - first.info.uptime_s
    return last, checks.Times(tuple(took), ended - begun, theirs)


def _outline(client: Client) -> Outline | None:
    try:
        return client.outline(order=Order.TOKENS, max_branches=500, ghosts=False)
    except NotFound:
        return None  # no layout yet


def _check(client: Client, *, deep: bool) -> Checked:
    """Have the invariants checked."""
    client.timeout_s = max(client.timeout_s, 60.0)
    return client.check(_EVERY_RUN) if deep else client.check()


def _print(one: Finding) -> None:
    for line in view.wrap(f"{_HEADS[one.level]} {one.text}", indent=" " * 6):
        view.tell(line)
    for paragraph in one.advice.splitlines():
        for line in view.wrap(f"      → {paragraph.strip()}", indent=" " * 8):
            view.tell(line)
