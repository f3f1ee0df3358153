"""Compile every kernel for real GPUs without one, and say what each needs of the chip.

    python -m prefixcache_kernels.ahead             all variants, beside the committed table
    python -m prefixcache_kernels.ahead --write     make the table anew: `ahead.json`

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
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prefixcache.errors import Unsupported
from prefixcache_kernels import attention, keys, launch, rotate, shared, transfer
from prefixcache_kernels.checks import FP8
from prefixcache_kernels.shape import Shape, next_power_of_2

TARGETS: Final = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90a": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, H100/H200 and MI300."""

TABLE: Final = Path(__file__).with_name("ahead.json")

VECTOR_BYTES: Final = 16
"""The widest load that there is; every kernel has it where bytes matter."""

_NAMES: Final = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with everything it is compiled for."""

    name: str
    kernel: Any
    signature: dict[str, str]
    """Argument to type, for what is not a constant."""
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2


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


def variants(target: str) -> Iterator[Variant]:
    """Every kernel as the wrappers launch it on a target, for the head shapes of common models."""
    gpu = TARGETS[target]
    cut = _Cut(gpu.backend == "hip", _fp8(gpu))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, FP8):
        yield _store(dtype, cut.amd)
        yield _copy(dtype, cut.amd)
    for heads, kv_heads, dim in ((9, 3, 64), (32, 8, 128), (16, 16, 80), (8, 1, 256)):
        for decode in (True, False):
            yield cut.attend(heads, kv_heads, dim, torch.bfloat16, decode)
    for decode in (True, False):
        yield cut.attend(32, 8, 128, torch.float16, decode)
        yield cut.attend(9, 3, 64, torch.float32, decode)
        yield cut.attend(32, 8, 128, torch.float32, decode)
        yield cut.attend(32, 8, 128, torch.bfloat16, decode, block_size=128)
        yield cut.attend(64, 8, 128, torch.bfloat16, decode, eight_bit=True)
        yield cut.attend(16, 16, 192, torch.bfloat16, decode, value_dim=128)
        yield cut.attend(64, 8, 64, torch.bfloat16, decode, windowed=True, sinks=True)
        yield cut.attend(8, 4, 256, torch.bfloat16, decode, windowed=True, capped=True)
    yield cut.attend(32, 8, 128, torch.bfloat16, decode=True, own=True)
    for heads, kv_heads, dim, num_seqs in ((9, 3, 64, 8), (32, 8, 128, 4), (32, 8, 128, 256)):
        yield cut.shared(heads, kv_heads, dim, torch.bfloat16, num_seqs)
    yield cut.shared(64, 8, 128, torch.bfloat16, 64, eight_bit=True)
    yield cut.shared(8, 1, 256, torch.bfloat16, 64)
    yield cut.shared(9, 3, 64, torch.float32, 8)
    yield _merge(64, torch.bfloat16, cut.amd)
    yield _merge(128, torch.bfloat16, cut.amd, slots=12)
    yield _merge(256, torch.float32, cut.amd)
    yield _rotate(8, 128, torch.bfloat16, cut.amd)
    yield _rotate(8, 64, torch.float32, cut.amd)


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
        if (signature[name].startswith("*") and name not in _UNALIGNED) or name.startswith("stride")
    }
    source = ASTSource(variant.kernel, signature, constants, aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options |= launch.OPTIONS
    compiled = triton.compile(source, target=gpu, options=options)
    if gpu.backend == "cuda":
        registers, spilled = _read_ptx(compiled.asm["ptx"], gpu.arch)
        widths = _ptx_loads(compiled.asm["ptx"])
    else:
        registers, spilled = _read_amdgcn(compiled.asm["amdgcn"])
        widths = _amdgcn_loads(compiled.asm["amdgcn"])
    narrow = sum(width < VECTOR_BYTES for width in widths)
    shared_bytes = compiled.metadata.shared
    return Report(
        target, variant.name, registers, spilled, shared_bytes, max(widths, default=0), narrow
    )


def _read_ptx(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes, as NVIDIA's assembler counts them."""
    from triton.backends.nvidia.compiler import get_ptxas

    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr  # noqa: S603
    used = re.search(r"Used (\d+) registers", said)
    stores = re.search(r"(\d+) bytes spill stores", said)
    if used is None or stores is None:
        raise RuntimeError(f"ptxas says neither registers nor spills: {said}")
    return int(used[1]), int(stores[1])


def _read_amdgcn(assembly: str) -> tuple[int, int]:
    """Vector registers and scratch bytes, from the metadata of AMD's assembly.

    Scalars that are parked in lanes of vector registers are not counted: they touch no memory.
    """
    vector = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    if vector is None or scratch is None:
        raise RuntimeError("the assembly's metadata lack register counts")
    return int(vector[1]), int(scratch[1])


def _ptx_loads(ptx: str) -> list[int]:
    """Bytes of each load from global memory, plain or straight into shared memory.

    >>> _ptx_loads("ld.global.v4.b32 {%r1, cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 ], 0x8;")
    [16, 8]
    """
    plain = re.findall(r"\bld\.global[.\w:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    direct = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)", ptx)
    return [int(n or 1) * int(bits) // 8 for n, bits in plain] + [int(n, 0) for n in direct]


def _amdgcn_loads(assembly: str) -> list[int]:
    """Bytes of each load from global memory.

    >>> _amdgcn_loads("global_load_dwordx4 v[0:3] buffer_load_dword v1 buffer_load_ushort v2")
    [16, 4, 2]
    """
    found = re.findall(
        r"\b(?:global|buffer|flat)_load_(?:[us](?=byte|short))?(byte|short|dword(?:x\d)?)", assembly
    )
    bytes_of = {"byte": 1, "short": 2, "dword": 4}
    widths = []
    for name in found:
        base, _, times = name.partition("x")
        widths.append(bytes_of[base] * int(times or 1))
    return widths


_UNALIGNED: Final = {*shared.PLAN, "own_ptr"}
"""Pointers that may begin anywhere."""


def _fp8(gpu: GPUTarget) -> int:
    if gpu.backend == "hip":
        return keys.FP8_BITS  # gfx942 knows another eight-bit type
    return keys.NATIVE_FP8 if gpu.arch >= 89 else keys.FP8_BITS


def _pointers(dtype: torch.dtype, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"*{_NAMES[dtype]}")


def _words(kernel: Any, given: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """The given types, and 32-bit integers for all other arguments that are no constants."""
    rest = (name for name in kernel.arg_names if name not in constants)
    tables = ("table_ptr", "start_ptr", "context_ptr", "own_ptr", "order_ptr")
    types = {"scale": "fp32", "softcap": "fp32", "lse_ptr": "*fp32"}
    types |= dict.fromkeys(("key_scale_ptr", "value_scale_ptr"), "*fp32")
    types |= dict.fromkeys((*tables, *shared.PLAN), "*i32")
    types |= given
    return {name: types.get(name, "i32") for name in rest}


def _store(dtype: torch.dtype, amd: bool) -> Variant:
    eight_bit = dtype == FP8
    constants = {"HEADS": 8, "HEAD_DIM": 128, "VALUE_DIM": 128, "BLOCK_SIZE": 16, "CHUNK": 1024}
    constants["FP8"] = eight_bit
    kernel = transfer.store_kernel
    new = torch.bfloat16 if eight_bit else dtype
    types = _pointers(new, "key_ptr", "value_ptr", "key_cache_ptr", "value_cache_ptr")
    if eight_bit:
        types |= {"key_cache_ptr": "*u8", "value_cache_ptr": "*u8"}
    types["slot_ptr"] = "*i64"
    name = f"store {'bf16 as fp8' if eight_bit else _NAMES[dtype]} 8x128"
    signature = _words(kernel, types, constants)
    moved = constants["CHUNK"] * new.itemsize
    return Variant(name, kernel, signature, constants, launch.warps(moved, amd=amd))


def _copy(dtype: torch.dtype, amd: bool) -> Variant:
    constants = {"SLOT": 1024, "CHUNK": transfer.CHUNK}
    kernel = transfer.copy_kernel
    element = "u8" if dtype == FP8 else _NAMES[dtype]
    types = {"blocks_ptr": f"*{element}", "copies_ptr": "*i64"}
    name = f"copy {'fp8' if dtype == FP8 else element} 8x128"
    signature = _words(kernel, types, constants)
    moved = constants["CHUNK"] * dtype.itemsize
    return Variant(name, kernel, signature, constants, launch.warps(moved, amd=amd))


def _rotate(heads: int, dim: int, dtype: torch.dtype, amd: bool) -> Variant:
    width, pairs = next_power_of_2(heads), next_power_of_2(dim // 2)
    constants = {"HEADS": heads, "WIDTH": width, "HEAD_DIM": dim, "HALF": dim // 2, "PAIRS": pairs}
    kernel = rotate.rotate_kernel
    types = _pointers(dtype, "blocks_ptr") | {"slot_ptr": "*i64", "turn_ptr": "*fp32"}
    signature = _words(kernel, types, constants)
    warps = launch.warps(width * pairs * dtype.itemsize, amd=amd)
    return Variant(f"rotate {_NAMES[dtype]} {heads}x{dim}", kernel, signature, constants, warps)


def _merge(dim: int, dtype: torch.dtype, amd: bool, slots: int = 8) -> Variant:
    constants = {
        "VALUE_DIM": dim,
        "VALUE_DIMS": dim,
        "SLOTS": slots,
        "WIDTH": next_power_of_2(slots),
        "LSE": False,
    }
    kernel = attention.merge_kernel
    types = {"part_ptr": "*fp32", "whole_ptr": "*fp32", "out_ptr": f"*{_NAMES[dtype]}"}
    name = f"merge {_NAMES[dtype]} {dim} of {slots}"
    warps = launch.warps(4 * dim * constants["WIDTH"], amd=amd)
    return Variant(name, kernel, _words(kernel, types, constants), constants, warps)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Attention as it is launched on one target."""

    amd: bool
    fp8: int

    def attend(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        decode: bool,
        *,
        value_dim: int | None = None,
        block_size: int = 16,
        own: bool = False,
        eight_bit: bool = False,
        windowed: bool = False,
        capped: bool = False,
        sinks: bool = False,
    ) -> Variant:
        values = value_dim or dim
        shape = Shape.choose(
            heads,
            kv_heads,
            dim,
            values,
            dtype.itemsize,
            num_queries=4 if decode else 8192,
            num_seqs=4,
            max_context=8192,
            amd=self.amd,
        )
        slots = 2 * shape.splits if own else shape.splits
        constants = shape.constants(heads, dim, values, block_size, dtype)
        constants |= {"BLOCK_Q": shape.block_q, "SPLITS": shape.splits, "SLOTS": slots, "OWN": own}
        constants |= {"WINDOWED": windowed, "CAPPED": capped, "SINKS": sinks, "LSE": slots > 1}
        constants["FP8"] = self.fp8 if eight_bit else keys.WIDE
        kernel = attention.attend_kernel
        types = self._types(dtype, eight_bit) | _pointers(dtype, "sink_ptr", "out_ptr")
        if slots > 1:
            types["out_ptr"] = "*fp32"
        options = [("window", windowed), ("softcap", capped), ("sinks", sinks), ("own", own)]
        name = " ".join(
            [
                "decode" if decode else "prefill",
                f"{_NAMES[dtype]} on fp8" if eight_bit else _NAMES[dtype],
                f"{heads}/{kv_heads}x{dim}" + ("" if values == dim else f"/{values}"),
                f"block {block_size}",
                *(option for option, chosen in options if chosen),
            ]
        )
        signature = _words(kernel, types, constants)
        return Variant(name, kernel, signature, constants, shape.num_warps, shape.num_stages)

    def shared(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        num_seqs: int,
        *,
        eight_bit: bool = False,
    ) -> Variant:
        shape = Shape.choose_shared(
            heads,
            kv_heads,
            dim,
            dim,
            dtype.itemsize,
            num_seqs=num_seqs,
            num_runs=8,
            max_context=8192,
            amd=self.amd,
        )
        constants = shape.constants(heads, dim, dim, 16, dtype)
        constants |= {"BLOCK_Q": shape.block_q, "SPLITS": shape.splits, "SLOTS": 2 * shape.splits}
        constants |= {"RUNS": 8, "WINDOWED": False, "CAPPED": False}
        constants["FP8"] = self.fp8 if eight_bit else keys.WIDE
        kernel = shared.shared_kernel
        types = self._types(dtype, eight_bit) | {"out_ptr": "*fp32"}
        element = f"{_NAMES[dtype]} on fp8" if eight_bit else _NAMES[dtype]
        name = f"shared {element} {heads}/{kv_heads}x{dim} for {num_seqs}"
        signature = _words(kernel, types, constants)
        return Variant(name, kernel, signature, constants, shape.num_warps, shape.num_stages)

    def _types(self, dtype: torch.dtype, eight_bit: bool) -> dict[str, str]:
        types = _pointers(dtype, "query_ptr", "key_ptr", "value_ptr")
        if eight_bit:
            held = "*fp8e4nv" if self.fp8 == keys.NATIVE_FP8 else "*u8"
            types |= {"key_ptr": held, "value_ptr": held}
        return types


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
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all of them")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="variants whose name begins so; repeatable"
    )
    options = parser.parse_args(arguments)
    if options.write and (options.target or options.only):
        parser.error("--write needs all variants for all targets")
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
        lines = ",\n".join(json.dumps(row) for row in rows["kernels"])
        TABLE.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')
    complaints = compare(reports)
    if options.json:
        json.dump(rows | {"complaints": complaints}, sys.stdout)
        sys.stdout.write("\n")
    else:
        for complaint in complaints:
            sys.stdout.write(f"WORSE: {complaint}\n")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
