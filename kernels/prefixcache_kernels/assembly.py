"""What assembly says of a kernel: registers, spills, and how wide it loads."""

from __future__ import annotations

import re
import subprocess
import tempfile


def read_ptx(ptx: str, arch: int) -> tuple[int, int]:
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


def read_amdgcn(assembly: str) -> tuple[int, int]:
    """Vector registers and scratch bytes, from the metadata of AMD's assembly.

    Scalars that are parked in lanes of vector registers are not counted: they touch no memory.
    """
    vector = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    if vector is None or scratch is None:
        raise RuntimeError("the assembly's metadata lack register counts")
    return int(vector[1]), int(scratch[1])


def ptx_loads(ptx: str) -> list[int]:
    """Bytes of each load from global memory, plain or straight into shared memory.

    >>> ptx_loads("ld.global.v4.b32 {%r1, cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 ], 0x8;")
    [16, 8]
    """
    plain = re.findall(r"\bld\.global[.\w:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    direct = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)", ptx)
    return [int(n or 1) * int(bits) // 8 for n, bits in plain] + [int(n, 0) for n in direct]


def amdgcn_loads(assembly: str) -> list[int]:
    """Bytes of each load from global memory.

    >>> amdgcn_loads("global_load_dwordx4 v[0:3] buffer_load_dword v1 buffer_load_ushort v2")
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
