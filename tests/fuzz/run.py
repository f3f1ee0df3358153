"""`make fuzz`: every target for its share of a time box; tells inputs and findings.

PYTHONPATH=tests python -m fuzz.run [--seconds 600] [--only messages] [--publish]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import grpc
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase

import prefixcache
from certificate_file import write
from fuzz import plane
from fuzz.wire import BATCHES, throw
from patience import PATIENCE_S
from prefixcache.client import unary
from prefixcache.types import pack
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache_bench.reports.figures import publish
from service.service_process import LAYOUT, environment, running, sizes

SHARES = {
    "messages": 0.08,
    "answers": 0.06,
    "rows": 0.06,
    "states": 0.05,
    "folders": 0.04,
    "stores": 0.04,
    "manifest": 0.05,
    "traces": 0.08,
    "conversations": 0.05,
    "prompts": 0.05,
    "logged": 0.04,
    "workers": 0.02,
    "identities": 0.05,
    "configs": 0.05,
    "texts": 0.02,
    "settings": 0.02,
    "wire": 0.10,
    "sockets": 0.04,
    "plane": 0.10,
}
DOCUMENT = Path("docs/reliability.md")
LEAST = 20
"""Inputs, however little time there is."""

_INTERNAL = 13


def coverage_guided(name: str, seconds: int, folder: Path) -> tuple[int, str]:
    """Run one atheris campaign; give the number of inputs, and what was found."""
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.campaign", name, str(seconds), str(folder / name)],
        capture_output=True,
        text=True,
        env=environment() | {"TMPDIR": str(folder)},
        check=False,
    )
    told = done.stdout + done.stderr
    count = re.search(r"number_of_executed_units: (\d+)", told)
    if done.returncode == 0 and count:
        return int(count[1]), ""
    return int(count[1]) if count else 0, told[-3000:]


def over_the_wire(seconds: float, target: str) -> tuple[int, str]:
    """Send batches that hypothesis makes to a real service, each on a session of its own."""
    count, due = 0, time.monotonic() + seconds

    with prefixcache.connect(target) as client:
        stream: Any = client.channel.stream_stream(
            unary.SESSION_PATH, pb.OpBatch.SerializeToString, pb.OpResults.FromString
        )
        hello = pb.OpBatch()
        hello.ops.add(id=1).attach.namespace.model = "m"
        layout = hello.ops[0].attach.layout
        layout.num_layers, layout.num_kv_heads, layout.head_dim = 1, 1, 4
        layout.dtype = pb.ELEMENT_TYPE_FLOAT32

        @settings(
            max_examples=200,
            deadline=None,
            database=DirectoryBasedExampleDatabase(Path(tempfile.gettempdir()) / "fuzz-examples"),
            suppress_health_check=list(HealthCheck),
            phases=(Phase.reuse, Phase.generate, Phase.shrink),
        )
        @given(BATCHES)
        def send(batch: pb.OpBatch) -> None:
            nonlocal count
            if time.monotonic() > due and count >= LEAST:
                return
            count += 1
            try:
                answers = list(stream(iter([hello, batch]), timeout=PATIENCE_S))
            except grpc.RpcError as error:
                expected = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
                if error.code() not in expected:
                    raise
                return
            for answer in answers:
                for result in answer.results:
                    assert result.error.code != _INTERNAL, result.error.message

        while time.monotonic() < due or count < LEAST:
            try:
                send()
            except Exception as finding:  # noqa: BLE001 - whatever it is, it is told
                notes = "\n".join(getattr(finding, "__notes__", ()))
                return count, f"{finding!r}\n{notes}"
        with client.attach("m", LAYOUT) as session:
            session.acquire(pack([1, 2, 3])).release()
        time.sleep(1.0)
        left = client.snapshot()
        if left.leases or left.private or left.quarantined:
            return count, f"left behind: {left}"
    return count, ""


def into_sockets(seconds: float, target: str) -> tuple[int, str]:
    """Throw garbage at a real service's socket; it must serve others all the while."""
    random, count, due = Random(1), 0, time.monotonic() + seconds
    with prefixcache.connect(target) as client:
        session = client.attach("m", LAYOUT)
        while time.monotonic() < due or count < LEAST:
            throw(client.address.path, random)
            count += 1
            if count % 50 == 0:
                session.acquire(pack([1, 2, 3])).release()
        session.close()
    return count, ""


def fuzz(seconds: float, only: str = "", *, progress: bool = True) -> dict[str, tuple[int, str]]:
    """Fuzz everything; give inputs and findings by target."""
    found: dict[str, tuple[int, str]] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder = Path(place)
        for name, share in SHARES.items():
            if only and name != only:
                continue
            span = seconds if only else seconds * share
            if progress:
                sys.stderr.write(f"{name}: {span:.0f} s\n")
            if name in ("wire", "sockets"):
                flags = [*sizes(64, 4), "--log-level", "error", "--ttl", "5"]
                flags += ["--segments", str(write(folder, model="m"))]
                flags += ["--quarantine", "0.1"]  # these workers have no process to be watched
                with running(f"unix:{folder}/{name}.sock", *flags) as service:
                    way = over_the_wire if name == "wire" else into_sockets
                    count, finding = way(span, service.target)
                    if service.process.poll() is not None or "Traceback" in service.log():
                        finding += f"\nthe service: {service.log()[-3000:]}"
                found[name] = (count, finding)
            elif name == "plane":
                found[name] = plane.campaign(span)
            else:
                found[name] = coverage_guided(name, max(1, round(span)), folder)
    return found


def main() -> int:
    """Fuzz within a time box; 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.run", description=__doc__)
    box = float(os.environ.get("FUZZ_SECONDS", "600"))
    parser.add_argument("--seconds", type=float, default=box)
    parser.add_argument("--only", choices=list(SHARES), default="")
    parser.add_argument("--publish", action="store_true", help=f"put the table into {DOCUMENT}")
    options = parser.parse_args()
    found = fuzz(options.seconds, options.only)
    lines = [f"{'target':<13} {'inputs':>12}  findings"]
    for name, (count, finding) in found.items():
        lines.append(f"{name:<13} {count:>12,}  {1 if finding else 0}")
    total = sum(count for count, _ in found.values())
    findings = [(name, finding) for name, (_, finding) in found.items() if finding]
    lines.append(f"{'all':<13} {total:>12,}  {len(findings)} in {options.seconds:.0f} s")
    sys.stdout.write("\n".join(lines) + "\n")
    for name, finding in findings:
        sys.stdout.write(f"\n==> {name}\n{finding}\n")
    if options.publish:
        publish(DOCUMENT, "fuzz", "$ make fuzz\n" + "\n".join(lines))
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
