"""`make bench`: run every speed benchmark and write their tables to docs/benchmarks.md.

Each benchmark is a command of its own and prints its own table, with its baseline measured in the
same run; this module only runs them one after the other and keeps what they print.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from prefixcache_bench.reports.provenance import commit, processor

DOCUMENT = Path("docs/benchmarks.md")
HEAD = """# Benchmarks

Written by `make bench`. The machine is shared and noisy: trust the ratios, which compare runs of
the same minute. Each section says of which run it is;
`python -m prefixcache_bench.speed.all --only NAME` renews those of that name.
"""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One command and what it shows."""

    module: str
    title: str
    about: str
    options: tuple[str, ...] = ()
    """What the command is given unless the run is a quick one."""

    def command(self, *, quick: bool) -> list[str]:
        """Give the command, for this interpreter."""
        return [sys.executable, "-m", self.module, *(("--quick",) if quick else self.options)]

    def shown(self, *, quick: bool) -> str:
        """Give the command as a reader would type it."""
        return " ".join(["python", *self.command(quick=quick)[1:]])


BENCHMARKS = (
    Benchmark(
        "prefixcache_bench.speed.radix",
        "The tree",
        "Against a minimal tree over packed bytes, without namespaces, tails, ghosts or a ledger. "
        "Microseconds.",
        options=("--full",),
    ),
    Benchmark(
        "prefixcache_bench.speed.core",
        "The core",
        "A whole request that goes on from a stored chat, as plain Python and compiled, and by "
        "SGLang's tree in Rust where `$PREFIXCACHE_SGLANG_PYTHON` names a Python that has it.",
    ),
    Benchmark(
        "prefixcache_bench.speed.rpc",
        "The wire",
        "The service, also with the compiled core, against a stub with the same messages and no "
        "cache behind it.",
        options=("--compiled",),
    ),
    Benchmark(
        "prefixcache_bench.speed.packing",
        "Packing",
        "What the client does to a prompt of 32k tokens before it is sent, every id looked at, "
        "beside a conversion that looks at none.",
    ),
    Benchmark(
        "prefixcache_bench.speed.recording",
        "Observing",
        "What shadow caches and watchers cost the service's event loop, per acquire, commit and "
        "release.",
    ),
    Benchmark(
        "prefixcache_bench.speed.decode",
        "Attention of one decode step on a CPU",
        "The paged path against transformers' DynamicCache and scaled_dot_product_attention on the "
        "same batch.",
    ),
    Benchmark(
        "prefixcache_bench.speed.grouped",
        "Shared prefixes, read once per group, on a CPU",
        "Attention of decode steps over our own pool: each sequence reading all of its keys, and "
        "each run of shared blocks read once for all who share it.",
    ),
    Benchmark(
        "prefixcache_bench.speed.grouped",
        "Shared prefixes, with two threads",
        "The same on two cores.",
        options=("--threads", "2"),
    ),
    Benchmark(
        "prefixcache_bench.speed.serving",
        "Serving",
        "The worker on SmolLM2-135M-Instruct, beside transformers' `generate`, and beside vLLM "
        "where `$PREFIXCACHE_VLLM_PYTHON` names a Python that has it.",
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks; 1 if one fails."""
    parser = argparse.ArgumentParser(prog="prefixcache_bench.speed.all", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller runs of each benchmark")
    parser.add_argument("--only", help="renew those whose module name contains this")
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    options = parser.parse_args(argv)
    chosen = [one for one in BENCHMARKS if not options.only or options.only in one.module]
    if not chosen:
        parser.error(f"no benchmark is called {options.only!r}")
    sections = {} if not options.output.exists() else sections_of(options.output.read_text())
    failed = 0
    for benchmark in chosen:
        print(f"==> {benchmark.shown(quick=options.quick)}", flush=True)
        started = time.monotonic()
        done = subprocess.run(
            benchmark.command(quick=options.quick), stdout=subprocess.PIPE, text=True, check=False
        )
        print(done.stdout, end="", flush=True)
        failed += done.returncode != 0
        took = time.monotonic() - started
        sections[benchmark.title] = (
            f"{benchmark.about}\n\n"
            f"```\n$ {benchmark.shown(quick=options.quick)}\n{done.stdout.rstrip()}\n```\n\n"
            f"{took:.0f} s · {_run()}\n"
        )
    if failed:
        print(f"{failed} of {len(chosen)} benchmarks failed; {options.output} is left as it was")
        return 1
    options.output.write_text(written(sections), encoding="utf-8")
    print(f"written: {options.output}")
    return 0


def sections_of(text: str) -> dict[str, str]:
    """Give the sections of the document by their titles, each with the run that it is of."""
    _, *found = text.split("\n## ")
    titled = [one.partition("\n\n") for one in found]
    return {title: f"{body.rstrip()}\n" for title, _, body in titled}


def written(sections: dict[str, str]) -> str:
    """Write the document: what `make bench` runs, in its order, and then what else was there."""
    titles = [one.title for one in BENCHMARKS if one.title in sections]
    titles += [title for title in sections if title not in titles]
    return "\n".join([HEAD, *(f"## {title}\n\n{sections[title]}" for title in titles)])


def _run() -> str:
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("grpcio", "torch", "triton", "transformers")
    )
    return (
        f"{datetime.now(UTC):%Y-%m-%d} · commit {commit()} · "
        f"{os.cpu_count()} cores of {processor()} · Python {platform.python_version()} · {versions}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
