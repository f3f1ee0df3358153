"""How fast a killed service comes back with what it had: one million blocks by default.

```
builder process    a cache with a state: prompts, growing answers  ──► kill -9 itself
this process       prefixcache serve --state  ──► how long, and how many tokens hit?
```
Blocks are small here (512 bytes), so that the index is what takes the time; larger pools add the
time of reading them once for their checksums, which is told as bytes a second.

    python -m prefixcache_bench.speed.restart [--blocks 1000000] [--state DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prefixcache.config import ServeSettings, load
from prefixcache.plain_json import json_text
from prefixcache.types import Grant, Layout, Namespace, WorkerId, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.reports.provenance import provenance
from prefixcache_bench.speed.signals import ending_in_order

LAYOUT = Layout(1, 1, 4, "float32")
BLOCK_SIZE = 16
SPACE = Namespace("restart-bench")
NUM_SYSTEMS, SYSTEM_TOKENS = 200, 512
GOAL_S = 3.0
DOCUMENT = Path("docs/reliability.md")


def settings(state: Path, num_blocks: int) -> ServeSettings:
    """Give the settings of a pool of `num_blocks`."""
    memory = num_blocks * BLOCK_SIZE * LAYOUT.token_bytes
    flags = {"memory": memory, "block_size": BLOCK_SIZE, "layout": LAYOUT, "state": state}
    return load(flags | {"ghosts": 0})


def prompts(num_blocks: int) -> Iterator[tuple[bytes, bytes]]:
    """Give prompts and answers, until they fill about all blocks."""
    random = np.random.default_rng(5)
    systems = [random.integers(0, 50_000, SYSTEM_TOKENS, np.uint32) for _ in range(NUM_SYSTEMS)]
    room = num_blocks - NUM_SYSTEMS * SYSTEM_TOKENS // BLOCK_SIZE - 4096
    while room > 0:
        own = random.integers(0, 50_000, int(random.integers(100, 600)), np.uint32)
        answer = random.integers(0, 50_000, int(random.integers(16, 120)), np.uint32)
        prompt = np.concatenate((systems[int(random.integers(NUM_SYSTEMS))], own))
        room -= -(-(len(own) + len(answer)) // BLOCK_SIZE)
        yield pack(prompt), pack(answer)


def build(state: Path, num_blocks: int) -> None:
    """Fill a state as a service does, then die without a word."""
    import structlog

    from prefixcache.pool import map_pool
    from prefixcache.service.backing import Backing

    structlog.configure(logger_factory=structlog.WriteLoggerFactory(file=sys.stderr))
    backing = Backing(settings(state, num_blocks))
    cache, handle, kept = backing.cache, backing.handle, backing.state
    if cache is None or handle is None or kept is None:
        raise SystemExit("no pool was made")
    memory = np.frombuffer(map_pool(handle), np.uint64, offset=handle.offset)
    memory[:] = np.random.default_rng(1).integers(0, 2**63, len(memory), np.uint64)
    me, requests, tokens = WorkerId(1), 0, 0
    cache.attach(me, SPACE, now=0.0)
    for prompt, answer in prompts(num_blocks):
        grant = cache.acquire(me, SPACE, prompt, reserve=len(answer) // 4, now=0.0)
        if not isinstance(grant, Grant):
            raise SystemExit("nobody else computes here")
        count = len(prompt) // 4
        cache.commit(me, grant.lease, count, now=0.0)
        for start in range(0, len(answer), 4 * BLOCK_SIZE):  # as decoding does, block by block
            part = answer[start : start + 4 * BLOCK_SIZE]
            count += len(part) // 4
            cache.commit(me, grant.lease, count, part, now=0.0)
        cache.release(me, grant.lease, now=0.0)
        requests += 1
        tokens += grant.ledger.cold + grant.ledger.granularity + len(answer) // 4
        while kept.condition.pending_bytes > 32 * 2**20:
            time.sleep(0.01)
    while kept.condition.pending_bytes or kept.condition.written_blocks < cache.num_indexed:
        time.sleep(0.05)
    told = {"requests": requests, "tokens": tokens, "blocks": cache.num_indexed}
    print(json_text(told), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def measure(state: Path, num_blocks: int, *, progress: bool) -> dict[str, Any]:
    """Build, kill, serve again; give the numbers."""
    import prefixcache

    def say(text: str) -> None:
        if progress:
            print(text, file=sys.stderr, flush=True)

    say(f"storing about {num_blocks:,} blocks")
    command = [sys.executable, "-m", "prefixcache_bench.speed.restart"]
    done = subprocess.run(
        [*command, "--build", str(state), "--blocks", str(num_blocks)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != -signal.SIGKILL:
        raise SystemExit(f"the builder ended with {done.returncode} instead of being killed")
    built = json.loads(done.stdout)
    say("killed; serving again")
    socket = state / "sock"
    memory = num_blocks * BLOCK_SIZE * LAYOUT.token_bytes
    flags = ["--memory", str(memory), "--block-size", str(BLOCK_SIZE), "--layout", str(LAYOUT)]
    flags += ["--ghosts", "0", "--log-level", "warning", "--state", str(state)]
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "prefixcache.cli", "serve", "--listen", f"unix:{socket}", *flags],
        stdout=subprocess.PIPE,
        text=True,
    ) as service:
        try:
            if not any(line.startswith("listening") for line in service.stdout or ()):
                raise SystemExit("the service did not start")
            ready_s = time.perf_counter() - started
            with prefixcache.connect(str(socket)) as client:
                info = client.call("snapshot", pb.SnapshotRequest())
                hits = asked = 0
                for number, (prompt, answer) in enumerate(prompts(num_blocks)):
                    if number % 20 == 0:
                        found = client.lookup(SPACE, prompt + answer + bytes(4))
                        hits += found.num_hit + found.num_partial
                        asked += found.num_tokens - 1
        finally:
            service.terminate()
    kept = info.service.state
    return {
        "blocks": built["blocks"],
        "tokens": built["tokens"],
        "requests": built["requests"],
        "restored_blocks": kept.restored_blocks,
        "restored_tokens": kept.restored_tokens,
        "damaged_blocks": kept.damaged_blocks,
        "restore_s": kept.restore_s,
        "ready_s": ready_s,
        "pool_bytes": memory,
        "manifest_bytes": sum(p.stat().st_size for p in state.glob("manifest*")),
        "hit_share": hits / asked,
        "goal_s": GOAL_S,
    }


def table(row: dict[str, Any]) -> str:
    """Write the numbers for people."""
    blocks = row["restored_blocks"]
    verdict = "met" if row["restore_s"] <= row["goal_s"] else "MISSED"
    lines = [
        f"stored     {row['blocks']:>11,} blocks   {row['tokens']:,} tokens in {row['requests']:,} "
        "requests, then kill -9",
        f"restored   {blocks:>11,} blocks   {row['restored_tokens']:,} tokens, "
        f"{row['damaged_blocks']} blocks damaged",
        f"reload     {row['restore_s']:>11.2f} s        {blocks / row['restore_s']:,.0f} blocks/s, "
        f"all checksums verified; goal {row['goal_s']:g} s: {verdict}",
        f"listening  {row['ready_s']:>11.2f} s        from the start of the process",
        f"hits       {100 * row['hit_share']:>11.2f} %        of the tokens of every 20th chat",
        f"on disk    {row['manifest_bytes'] / 2**20:>11.0f} MiB      manifest, beside "
        f"{row['pool_bytes'] / 2**20:,.0f} MiB of pool",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 if the reload takes longer than the goal or loses tokens."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.restart", description=__doc__
    )
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--state", type=Path, help="folder; default: a new one in /dev/shm")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--publish", action="store_true", help=f"put the table into {DOCUMENT}")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.build:
        build(options.build, options.blocks)
    folder = options.state or Path(tempfile.mkdtemp(prefix="restart-", dir="/dev/shm"))
    try:
        row = measure(folder, options.blocks, progress=True)
    finally:
        if options.state is None:
            shutil.rmtree(folder)
    print(table(row))
    if options.json:
        options.json.write_text(json_text(provenance() | row, indent=2) + "\n")
    if options.publish:
        publish(DOCUMENT, "restart", f"$ python -m prefixcache_bench.speed.restart\n{table(row)}")
    return 0 if row["restore_s"] <= GOAL_S and row["hit_share"] >= 0.99 else 1


if __name__ == "__main__":
    with ending_in_order():
        raise SystemExit(main())
