"""What the service costs: server CPU per op, beside servers that have no cache behind them.

Servers, each in a process of its own, take turns in the same run under the same load:

```
service   prefixcache serve                              the real thing
guarded   the same with --identities and a token         what proving who one is costs
stub      the service's own code over a hollow cache     what the cache costs
bare      a handler that fills in the messages itself    what the service's code costs
compiled  the service with `--compiled`'s core           what `make compiled` spares
```
The two without a cache read every token and answer with a block table of the same size.  A *pair*
is an acquire of a stored prompt plus 37 new tokens, and its release.

    python -m prefixcache_bench.speed.rpc [--compiled] [--seconds 1] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import psutil

from prefixcache.client import codec, unary
from prefixcache.client.address import this_host
from prefixcache.plain_json import json_text
from prefixcache.types import Layout, Namespace
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache_bench.reports.provenance import provenance
from prefixcache_bench.speed.compiling import NotMeasured, compile_core, sources_alone
from prefixcache_bench.speed.signals import ending_in_order

LAYOUT = Layout(30, 3, 64, "bfloat16")
BLOCK_SIZE = 16
NUM_BLOCKS = 300_000
NUM_PROMPTS = 32
NEW_TOKENS = 37
IN_FLIGHT = 8
OPS_PER_MESSAGE = 16
EXTENDS_PER_MESSAGE = 64
SERVERS = ("service", "guarded", "stub", "bare")
COMPILED = "compiled"
TOKEN = "benchmark"  # noqa: S105 - of a service that lives for a minute

SESSION_CALL = f"/{unary.SERVICE}/Session"


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of load."""

    name: str
    shape: str
    num_tokens: int
    unit: str
    goal_us: float | None
    """Server CPU per unit that the service must not exceed."""
    ratio_goal: float | None = None
    """How many times the stub's it must not exceed."""

    def verdict(self, service_us: float, ratio: float) -> str:
        """Say of each goal whether it is met."""
        goals = [(self.goal_us, "", service_us), (self.ratio_goal, "x stub", ratio)]
        return ", ".join(
            f"{goal:g}{unit} {'met' if found <= goal else 'MISSED'}"
            for goal, unit, found in goals
            if goal is not None
        )


CASES = (
    Case("unary pair, 1k tokens", "unary", 1_024, "pair", None),
    Case("unary pair, 4k tokens", "unary", 4_096, "pair", 600.0, 1.25),
    Case("unary pair, 32k tokens", "unary", 32_768, "pair", None),
    Case("16 ops a message, 1k tokens", "batch", 1_024, "pair", None),
    Case("16 ops a message, 4k tokens", "batch", 4_096, "pair", 65.0, 1.5),
    Case("16 ops a message, 32k tokens", "batch", 32_768, "pair", None),
    Case("64 extends a message", "extend", 1_024, "extend", 18.0),
)


@dataclass(slots=True)
class Series:
    """What one server showed in one case, one number per round."""

    cpu_us: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)

    def fields(self) -> dict[str, float]:
        """Give what is reported."""
        return {
            "cpu_us_min": min(self.cpu_us),
            "cpu_us_median": statistics.median(self.cpu_us),
            "cpu_us_max": max(self.cpu_us),
            "per_s_median": statistics.median(self.per_s),
            "p50_ms_median": statistics.median(self.p50_ms),
            "p99_ms_median": statistics.median(self.p99_ms),
        }


# ------------------------------------------------------------------------------------- the load


class Load:
    """Speaks the wire directly, so that the client's own cost stays out of the latencies."""

    def __init__(self, target: str, pid: int, token: str = "") -> None:
        self.process = psutil.Process(pid)
        self.metadata = (("authorization", f"Bearer {token}"),) if token else None
        self.channel = grpc.aio.insecure_channel(target, unary.CHANNEL_OPTIONS)
        self.calls: dict[str, Any] = {
            verb: partial(
                self.channel.unary_unary(
                    rpc.path, rpc.request.SerializeToString, rpc.response.FromString
                ),
                metadata=self.metadata,
            )
            for verb, rpc in unary.RPCS.items()
        }
        self.key = ""
        self.latencies: list[float] = []

    def prompts(self, num_tokens: int) -> list[bytes]:
        """Stored prompts, each with its own new tokens behind; the same for every server."""
        random = np.random.default_rng(num_tokens)
        return [
            random.integers(0, 49_152, num_tokens, dtype=np.uint32).tobytes()
            for _ in range(NUM_PROMPTS)
        ]

    @staticmethod
    def attach_request() -> pb.AttachRequest:
        """Ask to join as a worker that is watched, like a real one."""
        request = pb.AttachRequest(name="bench", pid=os.getpid(), host=this_host())
        codec.write_namespace(Namespace("bench"), request.namespace)
        codec.write_layout(LAYOUT, request.layout)
        return request

    async def core(self) -> str:
        """Ask the service what its core runs as."""
        told = await self.calls["snapshot"](pb.SnapshotRequest())
        return str(told.service.core)

    async def store(self, num_tokens: int) -> list[bytes]:
        """Store the prompts of a case; give what is asked for afterwards."""
        if not self.key:
            self.key = (await self.calls["attach"](self.attach_request())).worker_key
        asked = []
        for prompt in self.prompts(num_tokens):
            stored = prompt[: -4 * NEW_TOKENS]
            grant = (
                await self.calls["acquire"](pb.AcquireRequest(worker_key=self.key, tokens=stored))
            ).grant
            await self.calls["commit"](
                pb.CommitRequest(
                    worker_key=self.key, lease=grant.lease, num_tokens=len(stored) // 4
                )
            )
            await self.calls["release"](pb.ReleaseRequest(worker_key=self.key, lease=grant.lease))
            asked.append(prompt)
        return asked

    async def unary(self, prompts: list[bytes], until: float) -> int:
        """Unary pairs, 8 in flight."""
        done = 0
        acquire, release = self.calls["acquire"], self.calls["release"]

        async def lane(first: int) -> None:
            nonlocal done
            at = first
            while time.perf_counter() < until:
                start = time.perf_counter()
                tokens = prompts[at % len(prompts)]
                answer = await acquire(pb.AcquireRequest(worker_key=self.key, tokens=tokens))
                await release(pb.ReleaseRequest(worker_key=self.key, lease=answer.grant.lease))
                self.latencies.append(time.perf_counter() - start)
                done += 1
                at += IN_FLIGHT

        await asyncio.gather(*(lane(n) for n in range(IN_FLIGHT)))
        return done

    @contextlib.asynccontextmanager
    async def session(self) -> Any:
        """Open a session; gives a function that sends one message and awaits its answer."""
        stream: Any = self.channel.stream_stream(
            SESSION_CALL, pb.OpBatch.SerializeToString, pb.OpResults.FromString
        )
        call = stream(metadata=self.metadata)

        async def step(batch: pb.OpBatch) -> pb.OpResults:
            start = time.perf_counter()
            await call.write(batch)
            results: pb.OpResults = await call.read()
            self.latencies.append(time.perf_counter() - start)
            return results

        hello = pb.OpBatch()
        hello.ops.add(id=1).attach.CopyFrom(self.attach_request())
        await step(hello)
        try:
            yield step
        finally:
            goodbye = pb.OpBatch()
            goodbye.ops.add(id=1).detach.SetInParent()
            await step(goodbye)
            await call.done_writing()

    async def batch(self, prompts: list[bytes], until: float) -> int:
        """Messages of 8 acquires and the releases of the 8 leases before."""
        done, half, at = 0, OPS_PER_MESSAGE // 2, 0
        leases: list[int] = []
        async with self.session() as step:
            while time.perf_counter() < until:
                batch = pb.OpBatch()
                add = batch.ops.add
                for number, lease in enumerate(leases):
                    add(id=number + 1).release.lease = lease
                for number in range(half):
                    add(id=100 + number).acquire.tokens = prompts[(at + number) % len(prompts)]
                results = await step(batch)
                done += len(leases)
                leases = [r.acquire.grant.lease for r in results.results[len(leases) :]]
                at += half
        return done

    async def extend(self, prompts: list[bytes], until: float) -> int:
        """Messages of 64 extends by one token each, as a decode step of 64 sequences sends."""
        done = 0
        async with self.session() as step:
            batch = pb.OpBatch()
            for number in range(EXTENDS_PER_MESSAGE):
                batch.ops.add(id=number).acquire.tokens = prompts[number % len(prompts)]
            leases = [r.acquire.grant.lease for r in (await step(batch)).results]
            size = len(prompts[0]) // 4
            while time.perf_counter() < until:
                size += 1
                batch = pb.OpBatch()
                add = batch.ops.add
                for number, lease in enumerate(leases):
                    op = add(id=number).extend
                    op.lease = lease
                    op.num_tokens = size
                done += len((await step(batch)).results)
        return done

    async def measure(self, case: Case, seconds: float, series: Series) -> None:
        """Run one round of one case."""
        prompts = await self.store(case.num_tokens)
        run: Callable[[list[bytes], float], Awaitable[int]] = getattr(self, case.shape)
        await run(prompts, time.perf_counter() + seconds / 5)  # warm up
        self.latencies.clear()
        before, start = self.process.cpu_times(), time.perf_counter()
        done = await run(prompts, start + seconds)
        after, wall = self.process.cpu_times(), time.perf_counter() - start
        cpu = after.user + after.system - before.user - before.system
        series.cpu_us.append(cpu / done * 1e6)
        series.per_s.append(done / wall)
        cuts = statistics.quantiles(self.latencies, n=100)
        series.p50_ms.append(cuts[49] * 1e3)
        series.p99_ms.append(cuts[98] * 1e3)


# ---------------------------------------------------------------------------------- the servers


def serve_stub(target: str) -> None:
    """Run the service's own code over a cache that stores nothing."""
    from prefixcache.config import load
    from prefixcache.service import server
    from prefixcache.service.backing import Backing
    from prefixcache_bench.speed.hollow import HollowCache

    class HollowBacking(Backing):
        def settle_layout(self, layout: Layout, block_size: int = 0) -> Any:
            if self.cache is None:
                super().settle_layout(layout, block_size)
                self.cache = HollowCache(BLOCK_SIZE)  # type: ignore[assignment]
            return self.cache

    server.run(load(_settings(target)), print, HollowBacking)


def serve_bare(target: str) -> None:
    """Run handlers that fill in the messages themselves: as little code as the proto allows."""
    import uvloop

    fresh = iter(range(1, 2**62))

    def grant(tokens: bytes, message: pb.Grant) -> None:
        np.frombuffer(tokens, np.uint32).sum()
        message.lease = next(fresh)
        message.block_table = array("i", range(-(-len(tokens) // (4 * BLOCK_SIZE)))).tobytes()
        message.num_cached = len(tokens) // 4 - NEW_TOKENS
        message.ledger.hit = message.num_cached
        message.ledger.cold = NEW_TOKENS
        message.ttl_s = 30.0

    async def acquire(request: pb.AcquireRequest, context: Any) -> pb.AcquireResponse:
        response = pb.AcquireResponse()
        grant(request.tokens, response.grant)
        return response

    async def session(requests: Any, context: Any) -> None:
        while (batch := await context.read()) is not grpc.aio.EOF:
            results = pb.OpResults()
            add = results.results.add
            for op in batch.ops:
                verb = op.WhichOneof("op")
                result = add()
                result.id = op.id
                if verb == "acquire":
                    grant(op.acquire.tokens, result.acquire.grant)
                elif verb == "extend":
                    result.extend.keep = op.extend.num_tokens // BLOCK_SIZE
                elif verb == "release":
                    result.release.num_freed = op.release.lease & 1
                else:
                    getattr(result, verb).SetInParent()
            await context.write(results)

    def answer(rpc: unary.Rpc) -> Any:
        async def serve(request: Any, context: Any) -> Any:
            return rpc.response()

        return serve

    async def main() -> None:
        server = grpc.aio.server()
        methods: dict[str, Any] = {
            rpc.path.rpartition("/")[2]: grpc.unary_unary_rpc_method_handler(
                acquire if verb == "acquire" else answer(rpc),
                rpc.request.FromString,
                rpc.response.SerializeToString,
            )
            for verb, rpc in unary.RPCS.items()
        }
        methods["Session"] = grpc.stream_stream_rpc_method_handler(
            session, pb.OpBatch.FromString, pb.OpResults.SerializeToString
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(unary.SERVICE, methods),)
        )
        server.add_insecure_port(target)
        await server.start()
        print(f"listening at {target}", flush=True)
        await server.wait_for_termination()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def _settings(target: str) -> dict[str, Any]:
    return {
        "listen": [target],
        "memory": NUM_BLOCKS * BLOCK_SIZE * LAYOUT.token_bytes,
        "block_size": BLOCK_SIZE,
        "layout": LAYOUT,
        "pool": "none",
        "log_level": "error",
    }


def _write_identities(folder: Path) -> Path:
    path = folder / "identities.toml"
    digest = sha256(TOKEN.encode()).hexdigest()
    path.write_text(f'[[identity]]\nname = "b"\ntenant = "b"\ntoken_sha256 = "{digest}"\n')
    path.chmod(0o600)
    return path


@contextlib.contextmanager
def started(kind: str, folder: Path, sources: Path | None = None) -> Iterator[tuple[str, int]]:
    """Start a server of a kind in its own process; give its address and process id.

    `sources` is a folder whose package runs in place of the installed one.
    """
    target = f"unix:{folder}/{kind}.sock"
    if kind in ("service", "guarded", COMPILED):
        flags = [
            f"--{name.replace('_', '-')}={value[0] if name == 'listen' else value}"
            for name, value in _settings(target).items()
        ]
        if kind == "guarded":
            flags.append(f"--identities={_write_identities(folder)}")
        command = [sys.executable, "-P", "-m", "prefixcache.cli", "serve", *flags]
    else:
        command = [sys.executable, "-m", "prefixcache_bench.speed.rpc", "--serve", kind, target]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    if sources is not None:
        before = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(sources), *([before] if before else [])])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            if not any(line.startswith("listening") for line in process.stdout or ()):
                raise SystemExit(f"the {kind} did not start: {' '.join(command)}")
            yield target, process.pid
        finally:
            process.terminate()


# ---------------------------------------------------------------------------------- the report


async def compare(
    cases: list[Case], seconds: float, rounds: int, compiled: Path | None = None
) -> dict[str, dict[str, Series]]:
    """Measure all servers in all cases, taking turns; `compiled` is a folder with that core."""
    kinds = (*SERVERS, COMPILED) if compiled else SERVERS
    found = {case.name: {kind: Series() for kind in kinds} for case in cases}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rpc")))
        loads = {}
        for kind in kinds:
            token = TOKEN if kind == "guarded" else ""
            sources = compiled if kind == COMPILED else None
            loads[kind] = Load(*stack.enter_context(started(kind, folder, sources)), token)
        if compiled and (runs := await loads[COMPILED].core()) != COMPILED:
            raise NotMeasured(f"what was compiled does not run, but {runs}")
        for number in range(rounds):
            for case in cases:
                for turn in range(len(kinds)):
                    kind = kinds[(turn + number) % len(kinds)]
                    await loads[kind].measure(case, seconds, found[case.name][kind])
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for load in loads.values():
            await load.channel.close()
    return found


def report(cases: list[Case], found: dict[str, dict[str, Series]]) -> list[dict[str, Any]]:
    """Print the table; give its rows as numbers."""
    rows = []
    kinds = [*found[cases[0].name]]
    print("server CPU per op, microseconds: min / median / max of the rounds")
    head = (
        "case",
        *kinds,
        "guarded/open",
        "service/stub",
        "service/bare",
        "goal",
        "per s",
        "p50/p99 ms",
    )
    lines: list[tuple[str, ...]] = [head]
    for case in cases:
        series = {kind: found[case.name][kind].fields() for kind in kinds}
        medians = {kind: series[kind]["cpu_us_median"] for kind in SERVERS}
        row: dict[str, Any] = {
            "case": case.name,
            "unit": case.unit,
            "goal_us": case.goal_us,
            "ratio_guarded": medians["guarded"] / medians["service"],
            "ratio_guarded_p50": series["guarded"]["p50_ms_median"]
            / series["service"]["p50_ms_median"],
            "ratio_stub": medians["service"] / medians["stub"],
            "ratio_bare": medians["service"] / medians["bare"],
            "ratio_goal": case.ratio_goal,
            **series,
        }
        if COMPILED in series:
            row["ratio_compiled"] = series[COMPILED]["cpu_us_median"] / medians["stub"]
        rows.append(row)
        mine = series["service"]
        lines.append(
            (
                case.name,
                *(
                    " / ".join(f"{series[k][f'cpu_us_{m}']:.1f}" for m in ("min", "median", "max"))
                    for k in kinds
                ),
                f"{row['ratio_guarded']:.2f}, p50 {row['ratio_guarded_p50']:.2f}",
                f"{row['ratio_stub']:.2f}",
                f"{row['ratio_bare']:.2f}",
                case.verdict(medians["service"], medians["service"] / medians["stub"]),
                f"{mine['per_s_median']:,.0f}",
                f"{mine['p50_ms_median']:.2f}/{mine['p99_ms_median']:.2f}",
            )
        )
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    for case, row in zip(cases, rows, strict=True):
        if COMPILED in row:
            found_us = row[COMPILED]["cpu_us_median"]
            print(
                f"compiled, {case.name}: {row['ratio_compiled']:.2f}x stub, "
                f"{found_us / row['service']['cpu_us_median']:.2f}x pure Python  "
                f"{case.verdict(found_us, row['ratio_compiled'])}".rstrip()
            )
    return rows


def measure(options: argparse.Namespace) -> None:
    """Measure all servers, and say what was found."""
    if options.quick:
        options.seconds, options.rounds = 0.3, 2
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        names = ", ".join(case.name for case in CASES)
        raise SystemExit(f"--only {options.only!r}: no case has that in its name: {names}")
    with contextlib.ExitStack() as stack:
        compiled = None
        if options.compiled:
            compiled = stack.enter_context(sources_alone())[1]
            compile_core(compiled)
        found = asyncio.run(compare(cases, options.seconds, options.rounds, compiled))
    rows = report(cases, found)
    if options.json:
        head = provenance() | {
            "grpcio": grpc.__version__,
            "seconds": options.seconds,
            "rounds": options.rounds,
        }
        options.json.write_text(json_text(head | {"rows": rows}, indent=2) + "\n")


def main() -> None:
    """Run the benchmark, or one of its servers."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.rpc", description=__doc__
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="short: two rounds of 0.3 s")
    parser.add_argument(
        "--compiled", action="store_true", help="also with the core compiled, which takes a minute"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        kind, target = options.serve
        {"stub": serve_stub, "bare": serve_bare}[kind](target)
        return
    with ending_in_order():
        measure(options)


if __name__ == "__main__":
    main()
