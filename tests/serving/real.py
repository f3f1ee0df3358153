"""A front in this process with real engines of a tiny model, without a service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from patience import PATIENCE_S
from prefixcache_serving.router import Router
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.request import to_json
from prefixcache_worker.request_line import read_request
from serving.bench import Bench


class Worker:
    """An engine without a service that takes the lines of a worker's input."""

    def __init__(self, model: Model, router: Router, name: str = "real") -> None:
        self.name = name
        self._router = router
        self._model = model
        self._engine = Engine(model, None, None, chunk=32)

    def send(self, line: dict[str, Any]) -> None:
        if "cancel" in line:
            self._engine.cancel(line["cancel"])
        else:
            self._engine.submit(read_request(line, self._model))

    def step(self) -> None:
        for event in self._engine.step():
            self._router.hear(self.name, json.loads(json.dumps(to_json(event))))


@asynccontextmanager
async def serving(folder: Path, model: Model) -> AsyncIterator[Bench]:
    """A front with a real engine."""
    bench = Bench(folder, workers=0)
    worker = Worker(model, bench.router)
    bench.router.join(worker, 8)
    bench.workers = [worker]  # type: ignore[list-item]
    async with asyncio.timeout(PATIENCE_S), bench.listening(), bench.stepping(1e-3):
        yield bench


def post(folder: Path, model: Model, body: dict[str, Any]) -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        async with serving(folder, model) as bench:
            status, _, told = await bench.post(body)
        assert status == 200, told
        return dict(told)

    return asyncio.run(main())
