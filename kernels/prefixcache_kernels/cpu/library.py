"""The C library: compiled for this machine's processor at first use, then kept.

Triton does the same with its launcher: a C compiler is on every machine that serves, and code for
exactly this processor has vectors of the right width.  Compiling takes some seconds.

```
~/.cache/prefixcache/native/<hash of sources, compiler, flags and processor>.so
```

A folder that others may write is not used.  Without a compiler, and with `PREFIXCACHE_NATIVE=0`,
there is no library; `python -m prefixcache_kernels.cpu` says why.  `CC` is the compiler if it is
set; `PREFIXCACHE_CFLAGS` comes after our own flags: for another processor, or with a sanitizer.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess  # the compiler is the user's own, with fixed arguments
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch  # loads the OpenMP runtime that the library shares with it

from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache.model_folders import own_cache
from prefixcache.private_files import open_private, own_folder

_SOURCES: Final = Path(__file__).parent
_FLAGS: Final = (
    *("-std=gnu11", "-O3", "-fPIC"),
    *("-fno-math-errno", "-fno-strict-aliasing", "-Wno-psabi"),
)
_TIMEOUT_S: Final = 120


@dataclass(frozen=True)
class Library:
    """What was loaded.

    `attend` and `room` take the address of a `struct call` of `attend.c`, `linear` that of a
    `struct linear` of `linear.h`, `layer` what `layer.c` says.
    """

    path: Path
    width: int
    """Floats of a vector."""
    threaded: bool
    """Whether it shares PyTorch's threads; else it runs in the calling one."""
    matrices: bool
    """Whether it multiplies matrices of bfloat16 in hardware (AMX)."""
    pairs: bool
    """Whether numbers of bfloat16 meet by twos (AVX512-BF16)."""
    handle: ctypes.CDLL

    @property
    def vectors(self) -> str:
        """The vectors' name."""
        names = {16: "AVX-512", 8: "AVX", 4: "128-bit vectors"}
        return names.get(self.width, f"vectors of {self.width}")


@cache
def library() -> Library | None:
    """Give the library, compiled and loaded at the first call of a process; None: there is none."""
    try:
        return load()
    except Unsupported:
        return None


def at_hand() -> Library:
    """Give the library as `library` does: at no cost after a process's first call.

    Raises:
        Unsupported: as `load`.
    """
    return library() or load()


def describe() -> str:
    """Say how attention is done on this CPU, in a line.  Loads the library as `load` does."""
    try:
        made = load()
    except Unsupported as fault:
        return f"plain PyTorch: {fault}"
    threads = (
        "PyTorch's threads" if made.threaded else "one thread: no OpenMP in common with PyTorch"
    )
    units = f"{made.vectors} and AMX" if made.matrices else made.vectors
    return f"C, {units}, {threads}"


def load() -> Library:
    """Compile the library unless that was done before, and load it.

    Effect: a file in the cache folder.  Cost: seconds the first time, then a millisecond, for it
    looks anew; what computes asks `at_hand`.

    Raises:
        Unsupported: There is no compiler, it failed, or it was told not to; with its own words.
    """
    if os.environ.get("PREFIXCACHE_NATIVE", "1") == "0":
        raise Unsupported("PREFIXCACHE_NATIVE=0 turns it off")
    try:
        compiler, runtime = _compiler(), _openmp()
        try:
            return _load(compiler, runtime)
        except Unsupported:
            if runtime is None:
                raise
            # A compiler may speak to another runtime than PyTorch has: then without threads.
            return _load(compiler, None)
    except (OSError, RuntimeError, ValueError) as fault:  # no home, a full disk, flags in half
        raise Unsupported(f"the library cannot be made: {fault}") from None


def _load(compiler: list[str], runtime: Path | None) -> Library:
    target = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    own = shlex.split(os.environ.get("PREFIXCACHE_CFLAGS", ""))
    flags = (*_FLAGS, target, *(("-fopenmp",) if runtime else ("-Wno-unknown-pragmas",)), *own)
    path = _folder() / f"{_fingerprint(compiler, flags, runtime)}.so"
    if not path.exists():
        with _lock(path.parent):
            if not path.exists():  # others wait for the one that compiles
                _compile(compiler, flags, runtime, path)
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as fault:
        raise Unsupported(f"{path} does not load: {fault}") from None
    handle.prefixcache_attend.argtypes = [ctypes.c_void_p]
    handle.prefixcache_attend.restype = ctypes.c_int64
    handle.prefixcache_width.restype = ctypes.c_int64
    handle.prefixcache_room.argtypes = [ctypes.c_void_p]
    handle.prefixcache_room.restype = ctypes.c_int64
    handle.prefixcache_linear.argtypes = [ctypes.c_void_p]
    handle.prefixcache_linear.restype = None
    handle.prefixcache_rotation.argtypes = [
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 2,
        ctypes.c_float,
        *[ctypes.c_void_p] * 2,
    ]
    handle.prefixcache_rotation.restype = None
    handle.prefixcache_layer.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64]
    handle.prefixcache_layer.restype = ctypes.c_int64
    matrices = bool(ctypes.c_int64.in_dll(handle, "prefixcache_amx").value)
    handle.prefixcache_pairs.restype = ctypes.c_int64
    pairs = bool(handle.prefixcache_pairs())
    return Library(path, handle.prefixcache_width(), runtime is not None, matrices, pairs, handle)


@cache
def multiplies_matrices() -> bool:
    """Tell whether the processor multiplies bfloat16 matrices in hardware (AMX)."""
    return any(" amx_bf16" in line for line in _processor())


def _compiler() -> list[str]:
    """Give the command of the first compiler that is there, its own options behind it.

    Raises:
        Unsupported: None is.
    """
    names = [*filter(None, [os.environ.get("CC")]), "cc", "gcc", "clang"]
    for name in names:
        program, *options = shlex.split(name)
        if found := shutil.which(program):
            return [found, *options]
    raise Unsupported(f"no C compiler: none of {', '.join(names)} is in PATH")


def _openmp() -> Path | None:
    """Find the OpenMP runtime that PyTorch has loaded.

    A second one would have threads of its own, which compete with the first one's for the cores.
    """
    torch.get_num_threads()
    with Path("/proc/self/maps").open() as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "omp" in line}
    names = ("libgomp", "libomp", "libiomp5")
    found = [Path(path) for path in sorted(paths) if Path(path).name.startswith(names)]
    # Other packages bring theirs as well: PyTorch's is the one beside it.
    beside = [path for path in found if {"torch", "torch.libs"} & set(path.parts)]
    return next(iter([*beside, *found]), None)


def _folder() -> Path:
    """Give the folder of compiled libraries, made if need be.

    Raises:
        Unsupported: It cannot be made, or is another user's.
    """
    try:
        return own_folder(own_cache(), "native")
    except (OSError, InvalidRequest) as fault:
        raise Unsupported(f"no place for the compiled library: {fault}") from None


def _fingerprint(compiler: list[str], flags: tuple[str, ...], runtime: Path | None) -> str:
    """Name what the library depends on: a home may be shared by machines that differ."""
    digest = hashlib.sha256()
    for source in sorted((*_SOURCES.glob("*.c"), *_SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    facts = Path(compiler[0]).resolve().stat()
    known = (compiler, facts.st_size, facts.st_mtime_ns, flags, str(runtime), *_processor())
    digest.update(repr(known).encode())
    return digest.hexdigest()[:16]


def _processor() -> list[str]:
    """What the processor's cores say of themselves; all the same, on most machines."""
    with Path("/proc/cpuinfo").open() as lines:
        said = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return sorted(said)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    fd = open_private(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _compile(compiler: list[str], flags: tuple[str, ...], runtime: Path | None, path: Path) -> None:
    """Compile to a file of its own and move it to its place, so that no half of it is ever seen."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "made.so"
        sources = sorted(_SOURCES.glob("*.c"))
        parts = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        compiling = [
            [*flags, "-c", str(source), "-o", part]
            for source, part in zip(sources, parts, strict=True)
        ]
        # The runtime by its path, not by -fopenmp, which would bring the compiler's own.
        libraries = [*([str(runtime)] if runtime else []), "-lm"]
        plain = [flag for flag in flags if flag != "-fopenmp"]
        linking = [*plain, "-shared", *parts, *libraries, "-o", str(made)]
        for arguments in (*compiling, linking):
            code, said = _run([*compiler, *arguments])
            if code:
                said = said.strip()[-2000:] or "nothing said"
                raise Unsupported(f"{compiler[0]} failed with exit code {code}: {said}")
        made.replace(path)


def _run(command: list[str]) -> tuple[int, str]:
    """Run the compiler; give its exit code and what it said.

    What is preloaded into us, a sanitizer or another allocator, is not into it; and what it has
    started ends with it.

    Raises:
        Unsupported: It cannot be started, or does not end in time.
    """
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    try:
        running = subprocess.Popen(  # noqa: S603 - the compiler, with our own arguments
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except OSError as fault:
        raise Unsupported(f"{command[0]} failed: {fault}") from None
    with running:
        try:
            _, said = running.communicate(timeout=_TIMEOUT_S)
        except BaseException as fault:
            os.killpg(running.pid, signal.SIGKILL)
            if isinstance(fault, subprocess.TimeoutExpired):
                raise Unsupported(f"{command[0]} failed: {fault}") from None
            raise
    return running.returncode, said
