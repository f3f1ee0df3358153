"""The C library is compiled once, for this processor; and where it cannot be, it says why."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.native_cases import (
    SHARED,
    TOLERANCE,
    TYPES,
    check_halves,
    gap,
    groups_of,
    needs_library,
)
from patience import PATIENCE_S
from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache_kernels import GroupedPlan, GroupPlan, paged_attention, shared_prefix_attention
from prefixcache_kernels.cpu import attend, library, linear
from prefixcache_kernels.oracle import oracle_attention

Make = Callable[..., Any]

SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from prefixcache_kernels.cpu import library
print(library.describe())
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache folder that is empty, and a process that has loaded nothing."""
    monkeypatch.setenv("PREFIXCACHE_CACHE", str(tmp_path))
    monkeypatch.delenv("PREFIXCACHE_NATIVE", raising=False)
    library.library.cache_clear()
    yield tmp_path
    library.library.cache_clear()


@pytest.fixture
def hastily(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, where the compiler need not think long: what is tested is not how fast code is."""
    given = os.environ.get("PREFIXCACHE_CFLAGS", "")  # `make sanitize` has some
    monkeypatch.setenv("PREFIXCACHE_CFLAGS", f"{given} -O1")
    return fresh


@needs_library
@pytest.mark.parametrize(
    ("architecture", "width", "flag"),
    [("x86-64", 4, ""), ("x86-64-v3", 8, "avx2"), ("x86-64-v4", 16, "avx512vl")],
)
def test_every_width_of_vectors_gives_the_same(
    batch: Make,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    width: int,
    flag: str,
) -> None:
    """Compiled for processors without AVX, with AVX2 and with AVX-512, if this one can run it."""
    if platform.machine() != "x86_64" or f" {flag}" not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {flag or architecture}")
    given = os.environ.get("PREFIXCACHE_CFLAGS", "")  # `make sanitize` has some
    monkeypatch.setenv("PREFIXCACHE_CFLAGS", f"{given} -march={architecture}")
    try:
        loaded = library.load()
    except Unsupported as fault:
        pytest.skip(f"the compiler does not know it: {fault}")
    assert loaded.width == width
    monkeypatch.setattr(attend, "library", lambda: loaded)
    monkeypatch.setattr(linear, "at_hand", lambda: loaded)
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = torch.randn(40, 66).to(dtype), torch.randn(9, 66).to(dtype)
        matrix = linear.Matrix(linear.pack(weight), 66, 40)
        got = matrix.multiply(x)
        want = x.double() @ weight.double().T
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
        assert torch.equal(torch.cat([matrix.multiply(row[None]) for row in x]), got)
    for dtype in TYPES:
        for dim in (16, 40, 64):
            b = batch([*SHARED["lens"], (60, 70)], shared=SHARED["shared"], dtype=dtype, dim=dim)
            for options in ({}, {"softcap": 3.0, "sinks": torch.zeros(4)}, {"window": 30}):
                got = shared_prefix_attention(*b.args, groups_of(b), scale=dim**-0.5, **options)
                want = oracle_attention(*b.args, scale=dim**-0.5, **options)
                assert gap(got, want) <= TOLERANCE[dtype]
    check_halves(torch.float16)
    check_halves(torch.bfloat16)


@needs_library
def test_the_units_of_matrices_are_asked_for_and_can_be_left_out(
    hastily: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a compiler knows the processor's AMX, Linux gives it; a build without asks for none."""
    if " amx_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AMX")
    if library.load().matrices:
        assert " and AMX, " in library.describe()
    given = os.environ["PREFIXCACHE_CFLAGS"]
    monkeypatch.setenv("PREFIXCACHE_CFLAGS", f"{given} -mno-amx-tile -mno-amx-bf16 -mno-amx-int8")
    assert not library.load().matrices
    assert "AMX" not in library.describe()


@needs_library
def test_it_is_compiled_once_by_processes_that_start_together(hastily: Path) -> None:
    """Three processes, one compilation: the others wait for it."""
    real = next(filter(None, (shutil.which(name) for name in ("cc", "gcc", "clang"))))
    counted = hastily / "cc"
    counted.write_text(f'#!/bin/sh\necho x >> {hastily}/calls\nexec {real} "$@"\n')
    counted.chmod(0o755)
    environment = os.environ | {"CC": str(counted)}
    command = [sys.executable, "-c", SCRIPT, str(Path(attend.__file__).parents[2])]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in started:
        said, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
        assert said.startswith("C, ")
    sources = len(list(Path(attend.__file__).parent.glob("*.c")))
    assert (hastily / "calls").read_text().count("x") == sources + 1  # compiled, linked
    assert len(list((hastily / "native").glob("*.so"))) == 1


def test_without_a_compiler_pytorch_answers_and_says_why(
    batch: Make, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compiler, one that fails, and one that was not to be used."""
    b = batch(**SHARED)
    want = oracle_attention(*b.args, scale=0.25)
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    assert library.describe() == "plain PyTorch: no C compiler: none of cc, gcc, clang is in PATH"
    assert gap(paged_attention(*b.args, scale=0.25), want) <= 1e-5
    (fresh / "cc").write_text("#!/bin/sh\necho no such target >&2\nexit 3\n")
    (fresh / "cc").chmod(0o755)
    with pytest.raises(Unsupported, match="cc failed with exit code 3: no such target"):
        library.load()
    assert list((fresh / "native").glob("*.so")) == []
    monkeypatch.setenv("PREFIXCACHE_NATIVE", "0")
    assert library.describe() == "plain PyTorch: PREFIXCACHE_NATIVE=0 turns it off"


@needs_library
def test_without_a_common_openmp_it_runs_in_one_thread(
    batch: Make, hastily: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler whose code asks for another runtime than PyTorch has loaded."""
    (hastily / "libomp.so").write_bytes(b"another one")
    monkeypatch.setattr(library, "_openmp", lambda: hastily / "libomp.so")
    loaded = library.load()
    assert not loaded.threaded
    assert library.describe().endswith("one thread: no OpenMP in common with PyTorch")
    monkeypatch.setattr(attend, "library", lambda: loaded)
    b = batch(**SHARED)
    got = shared_prefix_attention(*b.args, groups_of(b), scale=0.25)
    assert gap(got, oracle_attention(*b.args, scale=0.25)) <= 1e-5


@needs_library
def test_a_compiler_may_have_options_of_its_own(
    hastily: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of `CC="ccache gcc"`."""
    real = next(filter(None, (shutil.which(name) for name in ("cc", "gcc", "clang"))))
    monkeypatch.setenv("CC", f"{shutil.which('env')} {real}")
    assert library._compiler() == [shutil.which("env"), real]
    assert library.load().path.parent == hastily / "native"


@pytest.mark.parametrize("broken", ["home", "flags", "proc"])
def test_whatever_is_amiss_it_is_no_fault_but_no_library(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """No home folder, flags with a quote left open, no /proc."""

    def fail(*_: object) -> None:
        raise RuntimeError("Could not determine home directory.")

    if broken == "home":
        monkeypatch.delenv("PREFIXCACHE_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", fail)
    elif broken == "flags":
        monkeypatch.setenv("PREFIXCACHE_CFLAGS", "'")
    else:
        monkeypatch.setattr(library, "_openmp", Path("/nowhere/maps").read_text)
    with pytest.raises(Unsupported, match=r"cannot be made|no place"):
        library.load()
    assert library.library() is None


def test_a_folder_that_others_may_write_is_not_used(fresh: Path) -> None:
    """Whoever can write a library there could run code as this user."""
    (fresh / "native").mkdir(mode=0o777)
    (fresh / "native").chmod(0o777)
    with pytest.raises(Unsupported, match="others may write there"):
        library.load()


@needs_library
def test_a_folder_that_cannot_be_written_is_no_fault(batch: Make, fresh: Path) -> None:
    """A full disk, or one that is read only: PyTorch answers."""
    (fresh / "native").mkdir(mode=0o700)
    (fresh / "native" / ".lock").mkdir()  # root may write anywhere, but not into a folder
    with pytest.raises(Unsupported, match="cannot be made"):
        library.load()
    b = batch(**SHARED)
    got = paged_attention(*b.args, scale=0.25)
    assert gap(got, oracle_attention(*b.args, scale=0.25)) <= 1e-5


@needs_library
def test_a_library_that_does_not_load_is_not_used(
    hastily: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file, or one of another machine."""
    monkeypatch.setattr(library, "_openmp", lambda: None)
    name = library.load().path.name
    monkeypatch.setenv("PREFIXCACHE_CACHE", str(hastily / "other"))
    (hastily / "other" / "native").mkdir(parents=True, mode=0o700)
    (hastily / "other" / "native" / name).write_bytes(b"no library")
    with pytest.raises(Unsupported, match="does not load"):
        library.load()


@needs_library
def test_the_command_says_what_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    """In a line, or as JSON."""
    from prefixcache_kernels.cpu.__main__ import main

    assert main([]) == 0
    assert capsys.readouterr().out.startswith("C, ")
    assert main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["width"] in (4, 8, 16)


@needs_library
def test_a_block_outside_the_pool_is_refused_before_anything_is_read(batch: Make) -> None:
    """Too large, negative, or only in 64 bits; entries that nobody reads may be anything."""
    b = batch(**SHARED)
    for wrong in (b.key_cache.shape[0], -1, 2**32):
        tables = b.block_tables.long()
        tables[1, 2] = wrong
        plan = GroupedPlan.build(tables, *b.args[4:], 16, GroupPlan.alone(4))
        with pytest.raises(InvalidRequest, match=f"the pool has {b.key_cache.shape[0]}"):
            shared_prefix_attention(
                *b.args[:3], tables, *b.args[4:], plan.groups, scale=1.0, plan=plan
            )
