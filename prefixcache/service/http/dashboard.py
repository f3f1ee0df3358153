"""What the page shows: the same moment for everybody who looks, computed once, in steps.

```
every second     state     pool, ledger, rates, leases, flights, workers   O(what is listed)
every 3 seconds  tree      the outline: 600 branches, the rest summed up   O(runs), in steps
                 blocks    the map of the pool: 1,200 cells      O(runs + blocks), in steps
```
All of it is sent as server-sent events on one stream per viewer, and only while somebody looks.
A viewer that does not read is held back by its own socket; it then gets the newest, not what it
missed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Generator
from itertools import islice
from time import monotonic, time
from typing import Any

from prefixcache import __version__
from prefixcache.core.introspect import STATES
from prefixcache.core.ledger import FATES
from prefixcache.outline import Branch, Order, Outline
from prefixcache.plain_json import json_text
from prefixcache.service.auth.identity import LOCAL
from prefixcache.service.handlers import Handlers
from prefixcache.texts import escape
from prefixcache.types import Namespace, unpack

_EVERY_S = 1.0
_SLOW_EVERY = 3
_MAX_BRANCHES = 600
_CELLS = 1200
_ROWS = 100
"""Leases, flights and namespaces that are listed; how many there are is told besides."""

_MOST_NAME = 160
_LAST_OF_NAME = 40
"""Characters of a namespace's name, and how many of them are its last."""

_IN_ONE_GO = 8
"""Branches that are written in one go."""

_HISTORY_POINTS = 600


class Dashboard:
    """The live data of the page.

    Args:
        handlers: whose state is shown.
    """

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._viewers = 0
        self._number = 0
        self._latest: dict[str, tuple[int, str]] = {}
        """By event: its number and its data."""
        self._fresh = asyncio.Event()
        self._closed = False
        self._painter: asyncio.Task[None] | None = None

    def history(self) -> bytes:
        """Give the last hour, thinned to some hundred points: columns of the samples."""
        samples = list(self._handlers.sampler.samples)
        step = max(1, -(-len(samples) // _HISTORY_POINTS))
        kept = samples[::-1][::step][::-1]
        columns: dict[str, list[Any]] = {"at": [round(sample.at, 1) for sample in kept]}
        for fate in FATES:
            columns[fate] = [getattr(sample.ledger, fate) for sample in kept]
        columns["requests"] = [sample.requests for sample in kept]
        return json_text(columns, separators=(",", ":")).encode()

    async def live(self) -> AsyncIterator[str]:
        """Give events for one viewer, for as long as it reads."""
        self._viewers += 1
        if self._painter is None:
            self._painter = asyncio.create_task(self._paint())
        seen: dict[str, int] = {}
        try:
            yield "retry: 1000\n\n"
            while not self._closed:
                for name, (number, data) in list(self._latest.items()):
                    if seen.get(name) != number:
                        seen[name] = number
                        yield f"event: {name}\ndata: {data}\n\n"
                await self._fresh.wait()
        finally:
            self._viewers -= 1

    def close(self) -> None:
        """End all streams.  Idempotent."""
        self._closed = True
        self._fresh.set()
        if self._painter is not None:
            self._painter.cancel()
            self._painter = None

    # ------------------------------------------------------------------------ painting

    async def _paint(self) -> None:
        """Make new data while there are viewers."""
        turn = 0
        try:
            while self._viewers and not self._closed:
                began = monotonic()
                await self._paint_one(turn)
                turn += 1
                await asyncio.sleep(max(0.05, _EVERY_S - (monotonic() - began)))
        except Exception as error:  # noqa: BLE001 - nobody waits for this task
            self._handlers.failures.tell("the page", error)
        finally:
            self._latest.clear()
            self._painter = None

    async def _paint_one(self, turn: int) -> None:
        state = self.state()
        await asyncio.sleep(0)
        self._publish("state", _json(state))
        cache = self._handlers.backing.cache
        if cache is None or turn % _SLOW_EVERY:
            return
        outline = await self._handlers.turns.run(
            cache.outline(
                order=Order.TOKENS,
                max_branches=_MAX_BRANCHES,
                max_namespaces=_ROWS,
                now=monotonic(),
            )
        )
        self._publish("tree", await self._handlers.turns.run(self._tree(outline)))
        cells = await self._handlers.turns.run(cache.block_map(_CELLS))
        self._publish("blocks", _json({"states": STATES, "cells": "".join(map(str, cells))}))

    def _publish(self, name: str, data: str) -> None:
        self._number += 1
        self._latest[name] = (self._number, data)
        fresh, self._fresh = self._fresh, asyncio.Event()
        fresh.set()

    def state(self) -> dict[str, Any]:
        """Give what changes every second."""
        handlers = self._handlers
        settings, now = handlers.settings, monotonic()
        cache, sizes = handlers.backing.cache, handlers.backing.sizes
        fields: dict[str, Any] = {
            "at": round(time(), 1),
            "service": {
                "version": __version__,
                "pid": os.getpid(),
                "uptime_s": round(handlers.uptime_s),
                "listening": handlers.listening,
                "policy": settings.policy,
                "partial": str(settings.partial),
                "sizes": None if sizes is None else str(sizes),
                "draining": handlers.draining,
            },
            "requests_per_s": handlers.sampler.requests_per_s(),
            "verbs": [_fields(rate) for rate in handlers.sampler.rates()],
            "workers": [
                _rounded(handlers.workers.status(worker, LOCAL, now)._asdict())
                | {"namespaces": [shown(space) for space in islice(worker.namespaces, 4)]}
                for worker in islice(reversed(handlers.workers.roll()), _ROWS)
            ],
        }
        if handlers.shadows is not None:
            fields["shadows"] = [
                {"name": told["name"], "dropped": handlers.shadows.num_dropped, **told["hour"]}
                for told in handlers.shadows.results
            ]
        if cache is None:
            return fields
        pool = fields["pool"] = cache.counts(now=now).fields()
        fields["ledger"] = pool.pop("ledger")._asdict()
        fields["requests"] = pool.pop("requests")
        fields["flights_saved"] = pool.pop("flights_saved")
        fields["namespaces"] = [
            {"namespace": shown(space), "requests": counts.requests, **counts.ledger._asdict()}
            for space, counts in sorted(cache.series().items(), key=lambda item: -item[1].requests)
        ]
        fields["leases"] = [
            {
                "lease": lease.lease,
                "worker": lease.worker,
                "namespace": shown(lease.namespace),
                "tokens": lease.num_tokens,
                "committed": lease.num_committed,
                "blocks": lease.num_blocks,
                "expires_in_s": round(lease.expires_in_s, 1),
            }
            for lease in cache.oldest_leases(_ROWS, now=now)
        ]
        fields["flights"] = [
            _fields(flight) | {"namespace": shown(flight.namespace)}
            for flight in cache.flights(_ROWS)
        ]
        return fields

    def _tree(self, outline: Outline) -> Generator[None, None, str]:
        """Write an outline as JSON, some dozens of branches in one go."""
        written, steps = [], 0
        for one in outline.namespaces:
            branches = []
            for branch in one.branches:
                branches.append(_json(self._branch(branch, bool(one.namespace.salt))))
                steps += 1
                if steps % _IN_ONE_GO == 0:
                    yield
            name = _json(shown(one.namespace))
            written.append(f'{{"namespace":{name},"branches":[{",".join(branches)}]}}')
        more = outline.more
        others = _json([outline.num_more, more.runs, more.tokens, more.ghost_tokens])
        size = outline.block_size
        return f'{{"block_size":{size},"more":{others},"namespaces":[{",".join(written)}]}}'

    def _branch(self, branch: Branch, salted: bool) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "depth": branch.depth,
            "start": branch.start,
            "tokens": branch.num_tokens,
            "blocks": branch.num_blocks,
            "below": [branch.below.runs, branch.below.tokens, branch.below.ghost_tokens],
            "heat": round(branch.heat, 3),
        }
        if branch.num_more:
            more = branch.more
            fields["more"] = [branch.num_more, more.runs, more.tokens, more.ghost_tokens]
        if branch.num_locks:
            fields["locks"] = branch.num_locks
        if branch.is_ghost:
            fields["ghost"] = True
        if branch.is_pinned:
            fields["pinned"] = True
        if branch.idle_s is not None:
            fields["idle_s"] = round(branch.idle_s, 1)
        if branch.num_uses is not None:
            fields["uses"] = branch.num_uses
        if branch.num_parted:
            fields["parted"] = [branch.parted_at, branch.num_parted]
        if self._handlers.settings.http_tokens and not salted:
            fields["ids"] = unpack(branch.tokens).tolist()
        return fields


def _fields(row: Any) -> dict[str, Any]:
    """Give the fields of a row as they are; `asdict` copies them deeply, which takes long."""
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}


def _rounded(fields: dict[str, Any]) -> dict[str, Any]:
    """Give times to the tenth of a second: the page shows no more."""
    return {
        name: round(value, 1) if isinstance(value, float) else value
        for name, value in fields.items()
    }


def _json(value: Any) -> str:
    return json_text(value, separators=(",", ":"), ensure_ascii=False)


def shown(namespace: Namespace) -> str:
    """Name a namespace for people, in characters that show themselves, as many as there is room.

    >>> shown(Namespace("m" * 1000, "lora"))[-8:], len(shown(Namespace("m" * 1000)))
    ('mmm/lora', 160)
    """
    name = str(namespace)
    if len(name) > _MOST_NAME:
        name = f"{name[: _MOST_NAME - _LAST_OF_NAME - 1]}…{name[-_LAST_OF_NAME:]}"
    return escape(name)
