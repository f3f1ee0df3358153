"""The small process that owns a pool on a GPU, and the service's end of it.

    python -m prefixcache.service.pool.device_owner --device 0        started by `serve --pool cuda`

The service makes no CUDA call: a call may take seconds, and a driver that hangs would hang the
event loop with all its workers.  So a process of its own holds the memory, and does nothing else:

```
service   {"epoch", "layout", "num_blocks", "block_size"} ──stdin──►  owner: alloc, zero, header
          ◄──stdout── {"name"}  or  {"error", "code"}                 waits for the end of stdin
service   ends, however it ends: stdin closes ──────────────────────► ends too; the driver frees
owner     dies: its pidfd fires ──► the pool is gone: the service says so and ends
```

Workers whose service has ended attach to the next one, under its epoch, and find an empty pool.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import select
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Final

from prefixcache.config import parse_layout
from prefixcache.device import CudaDriver, Driver
from prefixcache.errors import BY_CODE, CacheError, InvalidRequest, Unsupported
from prefixcache.plain_json import json_text
from prefixcache.pool import HEADER_BYTES, check_sizes, pack_header
from prefixcache.types import Layout, PoolHandle

START_S: Final = 120.0
"""A first CUDA call may take long where many GPUs are woken up."""

END_S: Final = 5.0


def own(driver: Driver, orders: IO[str], answers: IO[str]) -> int:
    """Hold a pool for as long as `orders` stays open: the whole life of the owner process.

    Args:
        driver: Of the device.
        orders: One line of JSON that says what pool, then nothing, then its end.
        answers: Gets one line of JSON: the pool's name, or an error.

    Returns:
        The exit code: 0, or 1 if there is no pool.
    """
    try:
        order = json.loads(orders.readline())
        layout = parse_layout(order["layout"])
        handle = PoolHandle(
            *("cuda-ipc", "", order["num_blocks"], order["block_size"], layout),
            *(order["epoch"], HEADER_BYTES),
        )
        num_bytes = HEADER_BYTES + handle.num_bytes
        address = driver.alloc(num_bytes)
        driver.zero(address, num_bytes)
        driver.write(address, pack_header(handle))
        answer = {"name": driver.export(address)}
    except CacheError as error:
        answer = {"error": str(error), "code": error.code}
    except (KeyError, TypeError, ValueError) as error:
        answer = {"error": f"an order that cannot be read: {error!r}", "code": InvalidRequest.code}
    answers.write(json_text(answer) + "\n")
    answers.flush()
    if "error" in answer:
        return 1
    # The memory is not freed but left to the driver: some worker may still have it open.
    orders.read()
    return 0


class DeviceOwner:
    """The service's end: one owner process and the handle of its pool.  A context manager."""

    def __init__(self, handle: PoolHandle, process: subprocess.Popen[str]) -> None:
        self.handle = handle
        self.pid = process.pid
        self._process = process
        self.pidfd = os.pidfd_open(process.pid)
        """Becomes readable when the owner has ended."""

    @classmethod
    def start(
        cls,
        layout: Layout,
        num_blocks: int,
        block_size: int,
        *,
        device: int = 0,
        command: Sequence[str] | None = None,
        timeout_s: float = START_S,
    ) -> DeviceOwner:
        """Start an owner and wait until it has the pool.  Blocks: not for the event loop.

        Args:
            layout: Shape of one token's keys and values.
            num_blocks: Blocks of the pool.
            block_size: Tokens of a block.
            device: The GPU.
            command: What to start; this module by default.
            timeout_s: How long it may take.

        Raises:
            InvalidRequest: A size that no pool can have.
            PoolExhausted: The GPU has not enough memory.
            Unsupported: There is no GPU, no driver, or the owner does not answer.
        """
        check_sizes(layout, num_blocks, block_size)
        epoch = secrets.randbits(63) | 1
        module = (
            sys.executable,
            "-m",
            "prefixcache.service.pool.device_owner",
            "--device",
            str(device),
        )
        process = subprocess.Popen(  # noqa: S603 - this interpreter, or what a test says
            [*(command or module)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the service, which then closes our stdin
        )
        order = {"epoch": epoch, "layout": str(layout)}
        order |= {"num_blocks": num_blocks, "block_size": block_size}
        try:
            answer = json.loads(_ask(process, json_text(order), timeout_s))
            if "error" in answer:
                raise BY_CODE.get(answer["code"], Unsupported)(answer["error"])
            name = str(answer["name"])
            handle = PoolHandle(
                "cuda-ipc", name, num_blocks, block_size, layout, epoch, HEADER_BYTES
            )
            return cls(handle, process)
        except BaseException:
            _end(process, 0.0)
            raise

    @property
    def alive(self) -> bool:
        """Whether the owner still holds the pool."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the owner, and with it the pool.  Idempotent."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
            _end(self._process, END_S)

    def __enter__(self) -> DeviceOwner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ask(process: subprocess.Popen[str], order: str, timeout_s: float) -> str:
    """Send one line and give the one that comes back."""
    assert process.stdin is not None
    assert process.stdout is not None
    line = ""
    try:
        process.stdin.write(order + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], timeout_s)[0]:
            raise Unsupported(
                f"the pool's owner process has not answered for {timeout_s:g} s: does nvidia-smi?"
            )
        line = process.stdout.readline()
    except BrokenPipeError:
        pass
    if not line:
        code = process.wait()
        raise Unsupported(f"the pool's owner process ended with {code} before it had a pool")
    return line


def _end(process: subprocess.Popen[str], patience_s: float) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None and not pipe.closed:
            try:
                pipe.close()
            except BrokenPipeError:
                continue
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Own a pool on a GPU until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m prefixcache.service.pool.device_owner")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="the GPU; default 0")
    options = parser.parse_args(arguments)
    try:
        driver = CudaDriver(options.device)
    except CacheError as error:
        sys.stdout.write(json_text({"error": str(error), "code": error.code}) + "\n")
        return 1
    return own(driver, sys.stdin, sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
