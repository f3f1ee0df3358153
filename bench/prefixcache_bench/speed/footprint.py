"""Memory of three workers on one model, and how soon one that is killed is replaced.

```
private     of each worker, with all of them up: what goes when it ends
shared      with others: weights, libraries; the pool, as far as it was touched
ready       of a replacement: from the end of its imports to its `ready` line, and from its start
```
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from prefixcache.plain_json import json_text
from prefixcache_bench.reports.provenance import provenance
from prefixcache_bench.speed.signals import ending_in_order
from prefixcache_worker.child_service import ChildService
from prefixcache_worker.child_worker import ChildWorker

_PROMPT: Final = 600
_GOAL_MB: Final = 350
_GOAL_S: Final = 3.0


def memory_mb(pid: int) -> dict[str, float]:
    """Give what a process has in memory, in MB: `private` and `shared`."""
    sums = {"Private": 0.0, "Shared": 0.0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        kind = line.partition("_")[0]
        if kind in sums and "_Hugetlb" not in line:
            sums[kind] += int(line.split()[1]) * 1024 / 1e6
    return {kind.lower(): value for kind, value in sums.items()}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start the service and the workers, let each answer, look at them, replace one."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="pfx") as name:
        folder = Path(name)
        target = f"unix:{folder / 's'}"
        service = ChildService(folder, target, ["--memory", "512MiB", "--model", options.model])
        done: asyncio.Queue[str] = asyncio.Queue()

        def tell(event: dict[str, Any]) -> None:
            if event["event"] in ("finished", "failed"):
                done.put_nowait(event["event"])

        def worker(number: int) -> ChildWorker:
            given = ["--model", options.model, "--dtype", options.dtype]
            given += ["--weights", options.weights]
            return ChildWorker(f"w{number}", folder, tell, target=target, options=given)

        async def answer(one: ChildWorker) -> None:
            tokens = [draw.randrange(100, 20_000) for _ in range(_PROMPT)]
            one.send({"id": one.name, "tokens": tokens, "max_new_tokens": 16})
            if await asyncio.wait_for(done.get(), 300) != "finished":
                raise RuntimeError(f"{one.name} did not answer")

        workers = [worker(number) for number in range(options.workers)]
        try:
            await service.ready()
            for one in workers:
                await one.ready()
                await answer(one)
            memories = [memory_mb(_pid(one)) for one in workers]
            ready = []
            for number in range(options.replacements):
                await workers[-1].stop()
                workers[-1] = worker(options.workers + number)
                started = time.monotonic()
                await workers[-1].ready()
                about = workers[-1].about
                ready.append((about["load_ms"] / 1e3, time.monotonic() - started))
            return {
                "network": workers[0].about["network"],
                "private_mb": [round(each["private"]) for each in memories],
                "shared_mb": [round(each["shared"]) for each in memories],
                "load_s": statistics.median(load for load, _ in ready),
                "start_s": statistics.median(whole for _, whole in ready),
            }
        finally:
            for child in (*workers, service):
                await child.stop()


def _pid(child: ChildWorker) -> int:
    assert child.process is not None
    return child.process.pid


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and say whether the goals are met."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.footprint", description=__doc__
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", default="packed")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--replacements", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one replacement")
    parser.add_argument("--strict", action="store_true", help="fail if a goal is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args(argv)
    if options.quick:
        options.replacements = 1
    told = provenance()
    measured = asyncio.run(measure(options))
    print(" · ".join(f"{key} {value}" for key, value in told.items()) + "\n")
    print(f"{options.workers} workers, network {measured['network']}, after an answer each")
    print("private MB   " + "  ".join(f"{mb:,}" for mb in measured["private_mb"]))
    print("shared MB    " + "  ".join(f"{mb:,}" for mb in measured["shared_mb"]))
    print(
        f"a replacement is ready {measured['load_s']:.1f} s after its imports, "
        f"{measured['start_s']:.1f} s after its start (median of {options.replacements})\n"
    )
    goals = [
        (f"private at most {_GOAL_MB} MB each", max(measured["private_mb"]) <= _GOAL_MB),
        (f"ready at most {_GOAL_S:g} s after the imports", measured["load_s"] <= _GOAL_S),
    ]
    for name, met in goals:
        print(f"{name}: {'met' if met else 'MISSED'}")
    if options.json:
        options.json.write_text(json_text(told | measured, indent=1), encoding="utf-8")
    return 1 if options.strict and not all(met for _, met in goals) else 0


if __name__ == "__main__":
    with ending_in_order():
        sys.exit(main())
