"""Compile every kernel for real GPUs without one, and say what each needs of the chip.

    python -m prefixcache_kernels.ahead [--json]

A kernel that spills registers is slow in a way no test of its answers shows.  So each variant that
the wrappers launch (cut by the same `Shape.choose`) is compiled for each target, and registers,
spills and shared memory are read from what the assembler says.  Exit code 1 if anything spills.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prefixcache.errors import Unsupported
from prefixcache_kernels import attention, launch, transfer

TARGETS: Final = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, H100/H200 and MI300."""

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


def variants(target: str) -> Iterator[Variant]:
    """Every kernel as the wrappers launch it on a target, for the head shapes of common models."""
    amd = TARGETS[target].backend == "hip"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield _store(dtype)
        yield _copy(dtype)
    for heads, kv_heads, dim in ((9, 3, 64), (32, 8, 128), (16, 16, 80), (8, 1, 256)):
        for decode in (True, False):
            yield _attend(heads, kv_heads, dim, torch.bfloat16, decode, amd)
    for decode in (True, False):
        yield _attend(32, 8, 128, torch.float16, decode, amd)
        yield _attend(9, 3, 64, torch.float32, decode, amd)
        yield _attend(32, 8, 128, torch.float32, decode, amd)
        yield _attend(32, 8, 128, torch.bfloat16, decode, amd, block_size=128)
        yield _attend(64, 8, 64, torch.bfloat16, decode, amd, windowed=True, sinks=True)
        yield _attend(8, 4, 256, torch.bfloat16, decode, amd, windowed=True, capped=True)
    yield _merge(64, torch.bfloat16)
    yield _merge(256, torch.float32)


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
        if signature[name].startswith("*") or name.startswith("stride")
    }
    source = ASTSource(variant.kernel, signature, constants, aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options |= launch.OPTIONS
    compiled = triton.compile(source, target=gpu, options=options)
    if gpu.backend == "cuda":
        registers, spilled = _read_ptx(compiled.asm["ptx"], gpu.arch)
    else:
        registers, spilled = _read_amdgcn(compiled.asm["amdgcn"])
    return Report(target, variant.name, registers, spilled, compiled.metadata.shared)


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


def _pointers(dtype: torch.dtype, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"*{_NAMES[dtype]}")


def _words(kernel: Any, given: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """The given types, and 32-bit integers for all other arguments that are no constants."""
    rest = (name for name in kernel.arg_names if name not in constants)
    return {name: given.get(name, "i32") for name in rest}


def _store(dtype: torch.dtype) -> Variant:
    constants = {"BLOCK_SIZE": 16, "HEAD_DIM": 128, "WIDTH": 1024, "CHUNK": 1024}
    kernel = transfer.store_kernel
    types = _pointers(dtype, "key_ptr", "value_ptr", "key_cache_ptr", "value_cache_ptr")
    types["slot_ptr"] = "*i64"
    name = f"store {_NAMES[dtype]} 8x128"
    return Variant(name, kernel, _words(kernel, types, constants), constants)


def _copy(dtype: torch.dtype) -> Variant:
    constants = {"SLOT": 1024, "CHUNK": transfer.CHUNK}
    kernel = transfer.copy_kernel
    types = {"blocks_ptr": f"*{_NAMES[dtype]}", "copies_ptr": "*i64"}
    name = f"copy {_NAMES[dtype]} 8x128"
    return Variant(name, kernel, _words(kernel, types, constants), constants)


def _attend(
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    decode: bool,
    amd: bool,
    *,
    block_size: int = 16,
    windowed: bool = False,
    capped: bool = False,
    sinks: bool = False,
) -> Variant:
    shape = attention.Shape.choose(
        heads,
        kv_heads,
        dim,
        dtype.itemsize,
        num_queries=4 if decode else 4096,
        num_seqs=4,
        max_context=8192,
        amd=amd,
    )
    constants = attention.constants(shape, heads, dim, block_size, dtype)
    constants |= {"WINDOWED": windowed, "CAPPED": capped, "SINKS": sinks}
    kernel = attention.attend_kernel
    types = _pointers(dtype, "query_ptr", "key_ptr", "value_ptr", "sink_ptr", "out_ptr")
    types |= {"table_ptr": "*i32", "start_ptr": "*i32", "context_ptr": "*i32", "lse_ptr": "*fp32"}
    types |= {"scale": "fp32", "softcap": "fp32"}
    if shape.splits > 1:
        types["out_ptr"] = "*fp32"
    options = [("window", windowed), ("softcap", capped), ("sinks", sinks)]
    name = " ".join(
        [
            "decode" if decode else "prefill",
            _NAMES[dtype],
            f"{heads}/{kv_heads}x{dim}",
            f"block {block_size}",
            *(option for option, chosen in options if chosen),
        ]
    )
    signature = _words(kernel, types, constants)
    return Variant(name, kernel, signature, constants, shape.num_warps, shape.num_stages)


def _merge(dim: int, dtype: torch.dtype) -> Variant:
    constants = {"HEAD_DIM": dim, "DIMS": dim, "SPLITS": 8}
    kernel = attention.merge_kernel
    types = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": f"*{_NAMES[dtype]}"}
    name = f"merge {_NAMES[dtype]} {dim} of 8"
    return Variant(name, kernel, _words(kernel, types, constants), constants)


def main(arguments: list[str] | None = None) -> int:
    """Compile all variants for all targets and print what each needs.  About a minute.

    Returns:
        The exit code: 0 if nothing spills, else 1.
    """
    parser = argparse.ArgumentParser(prog="prefixcache_kernels.ahead", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print numbers, not a table")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all of them")
    options = parser.parse_args(arguments)
    reports = []
    if not options.json:
        sys.stdout.write(
            f"{'target':8}{'variant':46}{'registers':>10}{'spilled':>9}{'shared':>9}\n"
        )
    for target in options.target or TARGETS:
        for variant in variants(target):
            report = compile_variant(variant, target)
            reports.append(report)
            if not options.json:
                sys.stdout.write(
                    f"{report.target:8}{report.variant:46}{report.registers:>10}"
                    f"{report.spilled_bytes:>9}{report.shared_bytes:>9}\n"
                )
                sys.stdout.flush()
    if options.json:
        json.dump(
            {"triton": triton.__version__, "kernels": [asdict(r) for r in reports]}, sys.stdout
        )
        sys.stdout.write("\n")
    return int(any(report.spilled_bytes for report in reports))


if __name__ == "__main__":
    sys.exit(main())
