"""Compile every kernel for real GPUs without one, and say what each needs of the chip.

    python -m prefixcache_kernels.ahead             all variants, beside the committed table
    python -m prefixcache_kernels.ahead --write     make the table anew: `ahead.json`
    python -m prefixcache_kernels.ahead --document  put the table into docs/kernels.md

A kernel that spills registers, or that loads two bytes at a time, is slow in a way no test of its
answers shows.  So each variant that the wrappers launch (cut by the same `Shape`) is compiled for
each target, and what it needs is read from the assembler's report and from the assembly itself:

```
registers      per thread (NVIDIA), or vector registers per lane (AMD)
spilled        bytes of a thread in local memory; must be 0
shared         bytes of shared memory of a program
load           bytes of the widest load from global memory; must be 16
narrow         loads of less than 16 bytes: tables and lengths; more of them means that keys or
               values fell apart
```

Exit code 1 if anything spills, loads narrowly, or has become worse than the table says.  Under
another Triton than made the table, only spills and the width of loads are looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import triton
from triton.compiler import ASTSource

from prefixcache.errors import Unsupported
from prefixcache.plain_json import json_text
from prefixcache_kernels import assembly, launch
from prefixcache_kernels.variants import TARGETS, UNALIGNED, Variant, variants

TABLE: Final = Path(__file__).with_name("ahead.json")

DOCUMENT: Final = Path("docs/kernels.md")
BEGIN: Final = "<!-- python -m prefixcache_kernels.ahead --document -->"
END: Final = "<!-- end -->"

VECTOR_BYTES: Final = 16
"""The widest load that there is; every kernel has it where bytes matter."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one variant needs on one target."""

    target: str
    variant: str
    registers: int
    """Per thread (NVIDIA) or vector registers per lane (AMD)."""
    spilled_bytes: int
    """Local memory of a thread that holds what did not fit into registers."""
    shared_bytes: int
    """Shared memory of a program."""
    load_bytes: int
    """Width of the widest load from global memory."""
    narrow_loads: int
    """Loads from global memory of less than 16 bytes."""

    def complaints(self, before: Report | None, *, same_triton: bool) -> list[str]:
        """Say what is wrong, or worse than it was.  Empty: nothing.

        >>> Report("sm_80", "copy", 40, 8, 0, 16, 3).complaints(None, same_triton=True)
        ['spills 8 bytes', 'is not in the table']
        """
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.load_bytes < VECTOR_BYTES:
            found.append(f"loads at most {self.load_bytes} bytes at once")
        if before is None:
            return [*found, "is not in the table"]
        if same_triton and self.narrow_loads > before.narrow_loads:
            found.append(f"has {self.narrow_loads} narrow loads, not {before.narrow_loads}")
        if same_triton and self.registers > before.registers:
            found.append(f"takes {self.registers} registers, not {before.registers}")
        if same_triton and self.shared_bytes > before.shared_bytes:
            found.append(f"takes {self.shared_bytes} bytes shared, not {before.shared_bytes}")
        return found


def compile_variant(variant: Variant, target: str) -> Report:
    """Compile one variant for one target and read its needs.  Seconds.

    Raises:
        Unsupported: Triton runs as an interpreter in this process and cannot compile.
    """
    if launch.INTERPRETED:
        raise Unsupported("TRITON_INTERPRET is set: kernels are interpreted here, not compiled")
    gpu = TARGETS[target]
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    # What the JIT would find at run time: torch aligns memory, strides are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if (signature[name].startswith("*") and name not in UNALIGNED)
        or (name.startswith("stride") and name != "stride_table")
    }
    source = ASTSource(variant.kernel, signature, constants, aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options |= launch.OPTIONS | {"enable_fp_fusion": variant.fused}
    compiled = triton.compile(source, target=gpu, options=options)
    if gpu.backend == "cuda":
        registers, spilled = assembly.read_ptx(compiled.asm["ptx"], gpu.arch)
        widths = assembly.ptx_loads(compiled.asm["ptx"])
    else:
        registers, spilled = assembly.read_amdgcn(compiled.asm["amdgcn"])
        widths = assembly.amdgcn_loads(compiled.asm["amdgcn"])
    narrow = sum(width < VECTOR_BYTES for width in widths)
    shared_bytes = compiled.metadata.shared
    return Report(
        target, variant.name, registers, spilled, shared_bytes, max(widths, default=0), narrow
    )


def read_table() -> tuple[str, dict[tuple[str, str], Report]]:
    """Give the committed table: the Triton version that made it, and a report per variant."""
    table = json.loads(TABLE.read_text())
    reports = [Report(**row) for row in table["kernels"]]
    return table["triton"], {(one.target, one.variant): one for one in reports}


def compare(reports: Iterable[Report]) -> list[str]:
    """Say of each variant what is wrong with it, or worse than in the committed table."""
    made_by, table = read_table()
    same = made_by == triton.__version__
    return [
        f"{one.target} {one.variant} {complaint}"
        for one in reports
        for complaint in one.complaints(table.get((one.target, one.variant)), same_triton=same)
    ]


def render() -> str:
    """Give the committed table in Markdown: registers and shared memory of each target."""
    made_by, table = read_table()
    rows = [
        f"Triton {made_by}; every variant spills 0 bytes and loads 16 bytes at once.",
        "",
        "| variant | " + " | ".join(f"{target}: registers, shared" for target in TARGETS) + " |",
        "|---|" + "---|" * len(TARGETS),
    ]
    for variant in dict.fromkeys(name for _, name in table):
        needs = (table[target, variant] for target in TARGETS)
        cells = (f"{one.registers}, {one.shared_bytes / 1024:.0f} KiB" for one in needs)
        rows.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def document(path: Path) -> str:
    """Give a document with the table between its marks made anew.  Changes nothing."""
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{render()}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Compile variants for targets and print what each needs.  Minutes for all.

    Returns:
        The exit code: 0 if nothing is wrong or worse, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_kernels.ahead",
        description="Compile every kernel for GPUs that are not here, and compare what each needs "
        "with the committed table.",
        epilog="example: python -m prefixcache_kernels.ahead --target sm_90a --only decode",
    )
    parser.add_argument("--json", action="store_true", help="print numbers, not a table")
    parser.add_argument("--write", action="store_true", help="make the committed table anew")
    parser.add_argument(
        "--document", action="store_true", help=f"put the committed table into {DOCUMENT}"
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all of them")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="variants whose name begins so; repeatable"
    )
    options = parser.parse_args(arguments)
    if options.write and (options.target or options.only):
        parser.error("--write needs all variants for all targets")
    if options.document:
        DOCUMENT.write_text(document(DOCUMENT))
        return 0
    reports = []
    if not options.json:
        sys.stdout.write(
            f"{'target':8}{'variant':48}{'registers':>10}{'spilled':>9}{'shared':>9}"
            f"{'load':>6}{'narrow':>8}\n"
        )
    for target in options.target or TARGETS:
        for variant in variants(target):
            if options.only and not variant.name.startswith(tuple(options.only)):
                continue
            one = compile_variant(variant, target)
            reports.append(one)
            if not options.json:
                sys.stdout.write(
                    f"{one.target:8}{one.variant:48}{one.registers:>10}{one.spilled_bytes:>9}"
                    f"{one.shared_bytes:>9}{one.load_bytes:>6}{one.narrow_loads:>8}\n"
                )
                sys.stdout.flush()
    if not reports:
        parser.error(f"no variant's name begins with {' or '.join(options.only)}")
    rows = {"triton": triton.__version__, "kernels": [asdict(report) for report in reports]}
    if options.write:
        lines = ",\n".join(json_text(row) for row in rows["kernels"])
        TABLE.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')
    complaints = compare(reports)
    if options.json:
        sys.stdout.write(json_text(rows | {"complaints": complaints}))
        sys.stdout.write("\n")
    else:
        for complaint in complaints:
            sys.stdout.write(f"WORSE: {complaint}\n")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
