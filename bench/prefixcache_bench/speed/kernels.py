"""How close the kernels come to what the GPU can do, beside other libraries' kernels.

    python -m prefixcache_bench.speed.kernels [--only decode] [--minutes 8]  on a GPU
    python -m prefixcache_bench.speed.kernels --tiny                         anywhere, to try it

Ceilings are measured in the same run: reading, by a sum over 4 GiB; copying, by torch's own copy.

```
decode     one query per sequence, every key read once; bytes / time, share of the read ceiling
prefill    causal attention over a paged prompt; rate against torch's on contiguous keys
shared     decode behind one shared prefix, each run read once; against our own unshared decode
moves      store, copy, rotate; bytes read and written / time, share of the copy ceiling
```

Times are medians over repetitions of a captured CUDA graph: launches cost nothing in it, as in an
engine that captures its decode step, and a kernel that could not be captured would fail here (of
peers, those that cannot are timed without, and marked `eager`).  Every answer is compared with that
of another path.  Peers run if they are installed, at batch 1, 32 and 256; why one did not run is in
the result.

`--tiny` runs everything at small sizes, in Triton's interpreter where there is no GPU, and without
peers.  Its times mean nothing.  Results go to `bench/results/`, with device, versions and commit.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixcache.plain_json import json_text
from prefixcache_bench.reports.provenance import provenance

if TYPE_CHECKING:
    from prefixcache_bench.speed.kernel_cases import Row

RESULTS = Path("bench/results")
SECTIONS = ("decode", "prefill", "shared", "moves")
LIBRARIES = ("torch", "triton", "flashinfer-python", "vllm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if an answer is wrong, 2 without a GPU."""
    options = _parse(argv)
    if options.tiny and not _has_gpu():
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    elif not _has_gpu():
        print("no GPU: --tiny proves the script in Triton's interpreter", file=sys.stderr)
        return 2
    from prefixcache_bench.speed.kernel_cases import Bench

    began = time.monotonic()
    bench = Bench(tiny=options.tiny, deadline=began + 60 * options.minutes)
    rows: list[Row] = []
    if not options.json:
        print(bench.describe())
        print(_HEAD)
    try:
        for section in options.only or SECTIONS:
            for row in bench.run(section):
                rows.append(row)
                if not options.json:
                    print(_line(row), flush=True)
    except KeyboardInterrupt:
        print("stopped: what was measured is kept", file=sys.stderr)
    result: dict[str, Any] = {
        **provenance(),
        "device": bench.device_name,
        "interpreted": bench.interpreted,
        "versions": _versions(),
        "ceilings_gb_s": bench.ceilings,
        "seconds": round(time.monotonic() - began, 1),
        "peers_absent": bench.absent,
        "skipped_for_time": bench.skipped,
        "rows": [asdict(row) for row in rows],
    }
    text = json_text(result, indent=1)
    if options.json:
        print(text)
    else:
        path = _write(options.output, bench.device_name, text)
        for peer, why in bench.absent.items():
            print(f"{peer}: not measured, {why}")
        if bench.skipped:
            print(f"{bench.skipped} cases did not fit into {options.minutes:g} minutes")
        print(f"written to {path}")
    return int(any(not (row.equal or row.peer) for row in rows))


_HEAD = (
    f"{'section':9}{'case':50}{'us':>10}{'GB/s':>9}{'of ceiling':>12}{'TFLOP/s':>9}"
    f"{'against':>22}{'times':>8}  equal"
)


def _line(row: Row) -> str:
    """One row of the table for people.

    Against 'unshared' 12.0 means 12 times as fast as our own decode without sharing.
    """

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        f"{row.section:9}{row.case:50}{row.us:>10.1f}{number(row.gb_s, '.0f'):>9}"
        f"{number(row.of_ceiling, '.1%'):>12}{number(row.tflop_s, '.1f'):>9}"
        f"{row.against or '':>22}{number(row.times, '.2f'):>8}  {'yes' if row.equal else 'NO'}"
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _write(output: Path | None, device: str, text: str) -> Path:
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    name = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
    path = output or RESULTS / f"kernels-{name}-{day}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    return path


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.kernels",
        description="Measure the Triton kernels against the GPU's ceilings and other libraries.",
        epilog="example: python -m prefixcache_bench.speed.kernels --only shared --minutes 3",
    )
    parser.add_argument(
        "--only", action="append", choices=SECTIONS, help="repeatable; default: all"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes; without a GPU interpreted"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="cases that do not fit are skipped"
    )
    parser.add_argument("--json", action="store_true", help="print the result, write no file")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS}/kernels-DEVICE-DAY.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
