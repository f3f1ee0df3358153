"""The command `prefixcache worker`.  Torch is imported when it is called."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from prefixcache.errors import InvalidRequest

_AGAIN: Final = "_PREFIXCACHE_WORKER_BEGAN_AGAIN"


def worker(
    connect: Annotated[
        str | None,
        typer.Option(
            "--connect", metavar="ADDRESS", help="The service; by default this machine's."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Hugging Face folder or id, or smollm2.")
    ] = "smollm2",
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="float32 or bfloat16; must be the pool's.")
    ] = "bfloat16",
    threads: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Keep workers x threads at most the number of cores."
        ),
    ] = 1,
    name: Annotated[str, typer.Option(help="For people: appears in snapshots.")] = "",
    chunk: Annotated[
        int, typer.Option(min=1, metavar="TOKENS", help="Tokens computed per step, at most.")
    ] = 256,
    max_batch: Annotated[
        int, typer.Option(min=1, metavar="N", help="Requests in hand at a time.")
    ] = 16,
    drafts: Annotated[
        int,
        typer.Option(min=0, max=15, metavar="N", help="Tokens a step looked up in what was said."),
    ] = 0,
    tell_steps: Annotated[
        bool,
        typer.Option(
            "--tell-steps",
            help="Tell steps of which nothing else is told; and each second, if there was none.",
        ),
    ] = False,
    weights: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="packed: in a file that all workers map; int8: likewise, in eight bits; private: "
            "in each worker's memory.",
        ),
    ] = "packed",
    invariant: Annotated[
        bool,
        typer.Option(
            "--invariant", help="Every bit of an answer the same in any company, cached or not."
        ),
    ] = False,
    solo: Annotated[
        bool, typer.Option("--solo", help="Without a service: no prefix is ever reused.")
    ] = False,
) -> None:
    """Serve a model on the shared pool: JSON-lines requests in, JSON-lines events out.

    A request has messages, prompt (a text) or tokens, and may have id, tools, max_new_tokens,
    temperature, top_p, seed, stop and more (docs/worker.md); {"cancel": ID} ends one.

    Example: echo '{"prompt": "Once upon a time", "max_new_tokens": 32}' | prefixcache worker
    """
    import os

    # Before torch is imported: its thread pools read this once.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    import prefixcache

    if solo and connect is not None:
        raise InvalidRequest(f"--solo is without a service, and --connect names one: {connect}")
    if not solo:
        prefixcache.connect(connect).close()  # says so before anything is loaded if nobody answers

    from prefixcache_worker.model import Model
    from prefixcache_worker.process import WorkerProcess

    loaded = Model.load(model, dtype=dtype, threads=threads, weights=weights)
    if loaded.packed_now and not os.environ.get(_AGAIN):
        # Nothing was read or told yet: begin again as small as those who find the weights packed.
        os.environ[_AGAIN] = "1"
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - this very command
    WorkerProcess(
        loaded.made_invariant() if invariant else loaded,
        connect,
        solo=solo,
        name=name,
        chunk=chunk,
        max_batch=max_batch,
        drafts=drafts,
        tells_steps=tell_steps,
    ).run()
