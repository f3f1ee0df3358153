"""The demo's processes: one service on a float32 pool and some workers, each one thread.

```
demo ─┬─ prefixcache serve                      private Unix socket in a temporary folder
      ├─ prefixcache worker --name w1
      └─ prefixcache worker --name w2
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from prefixcache_worker.child_service import ChildService
from prefixcache_worker.child_worker import ChildWorker

CHUNK: Final = 128
"""Tokens of a worker's step.  Half a server's usual: in float32, which the comparison needs, a step
of 256 takes a processor core most of a second, and warm requests wait behind it."""


def service_in(folder: Path, memory: str, model: str, *more: str) -> ChildService:
    """Make the service, on a socket in `folder`; not started yet.

    Args:
        folder: for the socket and what the service writes.
        memory: size of the pool.
        model: if it is a folder, the service derives and prints the pool's layout at once.
        more: options of the service.
    """
    options = ["--memory", memory, "--grace", "1", *more]
    if model and (Path(model) / "config.json").is_file():
        options += ["--model", model, "--dtype", "float32"]
    return ChildService(folder, f"unix:{folder}/cache.sock", options)


def worker_in(
    folder: Path,
    name: str,
    *,
    command: Sequence[str],
    model: str,
    target: str | None,
    invariant: bool,
    tell: Callable[[ChildWorker, dict[str, Any], float], None],
    clock: Callable[[], float],
) -> ChildWorker:
    """Make a worker; not started yet.

    Args:
        folder: where its standard error is kept.
        name: what the service and people call it.
        command: the command line of a worker, to which the options are added.
        model: path or id for `--model`.
        target: the service's address; None: a worker without any cache.
        invariant: compute every bit of an answer alike in any company.
        tell: called for every event, with the clock's reading when its line arrived.
        clock: seconds since the run began.
    """
    options = ["--model", model, "--dtype", "float32", "--chunk", str(CHUNK)]
    worker = ChildWorker(
        name,
        folder,
        lambda event: tell(worker, event, clock()),
        target=target,
        options=[*options, "--invariant"] if invariant else options,
        command=command,
    )
    return worker
