"""Packed weights in a file: made once for a model, mapped read-only by all of its workers.

```
~/.cache/prefixcache/weights/smollm2-135m-instruct-v1@298a946338545762.bfloat16.v1

 0      magic, version, bytes of the head, digest of the head and of what follows it     96 bytes
96      head, JSON: facts of the model; of each tensor its name, type, shape and place
 ...    tensors, each from a multiple of 64 bytes on
```

The first worker that needs it makes it, under a lock that the others wait for, and renames it to
its place.  One that is damaged, cut short, of another version or of another user's is made anew,
and that is said.  A worker that replaces another one maps what is in memory already: it converts
nothing, and needs no memory of its own for weights.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import re
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from prefixcache.errors import CacheError, InvalidRequest, Unsupported
from prefixcache.model_folders import own_cache
from prefixcache.plain_json import json_text
from prefixcache.private_files import open_private, own_folder, remove_foreign

VERSION: Final = 1
"""Changes whenever the order of packed numbers or the head's fields do."""

_MAGIC: Final = b"prefixcache packed weights\n"
_HEAD: Final = struct.Struct("<27s x I Q 24x 32s")
"""Magic, version, bytes of the JSON, digest."""

_ALIGN: Final = 64
_MOST_HEAD: Final = 64 << 20
_WHOLE_BYTES: Final = 1 << 30
"""Files up to this size are read in full when they are mapped (1 s per GB, once per start)."""
_SAMPLES: Final = 4096
_SAMPLE_BYTES: Final = 4096

_TYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
_NAMES: Final = {dtype: name for name, dtype in _TYPES.items()}


class Damaged(Exception):
    """What is there is not what was written; the message says how that shows."""


@dataclass(frozen=True, slots=True)
class Packed:
    """What a file of weights holds, mapped.  Its tensors cannot be written to."""

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def path_of(model: str, kind: str) -> Path:
    """Give the place of a model's packed weights.  Changes nothing.

    Args:
        model: its name with the digest of its weights: `identity.identify`.
        kind: the type of the packed numbers.

    Raises:
        InvalidRequest: this user has no home.
    """
    plain = re.sub(r"[^A-Za-z0-9@._-]", "_", model)[-120:]
    if plain != model:  # what was replaced may have told two models apart
        plain += "-" + blake2b(model.encode(), digest_size=8).hexdigest()
    return own_cache() / "weights" / f"{plain}.{kind}.v{VERSION}"


@contextmanager
def making(path: Path) -> Iterator[None]:
    """Hold the right to make the file; whoever else wants to, waits.  Makes the folder.

    Raises:
        Unsupported: there is no place for it, or others may write there.
    """
    try:
        own_folder(path.parent.parent, path.parent.name)
        fd = open_private(path.parent / ".lock", os.O_RDWR | os.O_CREAT)
    except (OSError, InvalidRequest) as fault:
        raise Unsupported(f"no place for packed weights: {fault}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def write(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file of weights; call it under `making`.  Replaces what is there in one step.

    Files of the same model and kind in other versions are removed: nobody will map them any more.

    Raises:
        Unsupported: it cannot be written: no room, say.
    """
    begins, end = [], 0
    for tensor in tensors.values():
        begins.append(-(-end // _ALIGN) * _ALIGN)
        end = begins[-1] + tensor.nbytes
    entries = [
        [name, _NAMES[tensor.dtype], list(tensor.shape), begin]
        for (name, tensor), begin in zip(tensors.items(), begins, strict=True)
    ]
    head = json_text({"facts": dict(facts), "tensors": entries, "num_bytes": end}).encode()
    start = _start(len(head))
    size = start + end
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".making-", delete=False) as file:
            made = Path(file.name)
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # no room is said before, not amidst
                file.seek(_HEAD.size)
                file.write(head)
                for begin, tensor in zip(begins, tensors.values(), strict=True):
                    file.seek(start + begin)
                    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                file.flush()
                with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as whole:
                    digest = _digest(whole)
                file.seek(0)
                file.write(_HEAD.pack(_MAGIC, VERSION, len(head), digest))
                file.flush()
                os.fsync(file.fileno())
                made.replace(path)
            except BaseException:
                made.unlink(missing_ok=True)
                raise
        stem = path.name.removesuffix(f".v{VERSION}")
        for other in path.parent.glob(f"{stem}.v*"):
            if other != path and other.name.removeprefix(f"{stem}.v").isdigit():
                other.unlink(missing_ok=True)
    except OSError as fault:
        raise Unsupported(f"packed weights cannot be written to {path}: {fault}") from None


def open_packed(path: Path) -> Packed | None:
    """Map a file of weights; None if there is none.  Reads it once (files over 1 GiB: a sample).

    Raises:
        Damaged: it is not what `write` wrote, or not by this user.
    """
    try:
        if path.exists() and remove_foreign(path):
            raise Damaged("it was another user's, or a link")
        fd = open_private(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as fault:
        raise Damaged(f"it cannot be opened: {fault}") from None
    with os.fdopen(fd, "rb"):
        size = os.fstat(fd).st_size
        if size < _HEAD.size:
            raise Damaged(f"it has {size} bytes")
        memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    magic, version, head_bytes, digest = _HEAD.unpack_from(memory)
    if magic != _MAGIC or version != VERSION:
        raise Damaged("it begins with other bytes than such a file has")
    if head_bytes > min(_MOST_HEAD, size - _HEAD.size) or digest != _digest(memory):
        raise Damaged("its digest is another one than it was when it was made")
    try:
        return _read(path, memory, head_bytes)
    except (ValueError, KeyError, TypeError, RuntimeError, CacheError) as fault:
        raise Damaged(f"its head cannot be read: {fault}") from None


def _read(path: Path, memory: mmap.mmap, head_bytes: int) -> Packed:
    head = json.loads(memory[_HEAD.size : _HEAD.size + head_bytes])
    start = _start(head_bytes)
    if start + head["num_bytes"] != len(memory):
        raise Damaged(f"it has {len(memory)} bytes, not {start + head['num_bytes']}")
    tensors = {}
    with warnings.catch_warnings():
        # Torch warns of memory that cannot be written: nobody does, and that is what it is for.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        for name, kind, shape, begin in head["tensors"]:
            count = 1
            for size in shape:
                count *= size
            dtype = _TYPES[kind]
            if not count:  # of nothing there is no buffer
                tensors[name] = torch.empty(shape, dtype=dtype)
                continue
            flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=start + begin)
            tensors[name] = flat.view(shape)
    return Packed(path, head["facts"], tensors)


def _start(head_bytes: int) -> int:
    """Where tensors begin: on a page."""
    return -(-(_HEAD.size + head_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE


def _digest(memory: mmap.mmap) -> bytes:
    """Of all behind the first bytes; of a large file, of 4,096 pages spread over it."""
    size = len(memory)
    digest = blake2b(size.to_bytes(8, "little"), digest_size=32, person=b"pfxcache-packed")
    with memoryview(memory) as view:
        if size <= _WHOLE_BYTES:
            digest.update(view[_HEAD.size :])
            return digest.digest()
        digest.update(view[_HEAD.size : _HEAD.size + _SAMPLE_BYTES])
        last = size - _HEAD.size - _SAMPLE_BYTES
        for i in range(_SAMPLES):
            begin = _HEAD.size + last * i // (_SAMPLES - 1)
            digest.update(view[begin : begin + _SAMPLE_BYTES])
    return digest.digest()
