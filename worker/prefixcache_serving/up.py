"""`prefixcache up`: an OpenAI-compatible endpoint over several workers, in one command."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

_PANELS = ("Endpoint", "Workers", "Pool")


def _option(panel: str, text: str, metavar: str | None = None, **more: Any) -> Any:
    return typer.Option(help=text, metavar=metavar, rich_help_panel=panel, **more)


def up(
    model: Annotated[
        str, _option("Workers", "Hugging Face folder or id, or smollm2.", "MODEL")
    ] = "smollm2",
    workers: Annotated[int, _option("Workers", "How many, on one pool.", "N", min=1, max=64)] = 2,
    http: Annotated[
        str,
        _option(
            "Endpoint",
            "Where to listen: HOST:PORT or unix:/path. Interfaces other than the loopback device "
            "need --api-keys.",
            "ADDRESS",
        ),
    ] = "127.0.0.1:8000",
    api_keys: Annotated[
        Path | None,
        _option(
            "Endpoint",
            "File of the keys that are accepted, one a line, a tenant behind it; mode 600.",
            "FILE",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str, _option("Endpoint", "What requests call the model. Default: as --model.", "NAME")
    ] = "",
    queue: Annotated[
        int, _option("Endpoint", "Answers that may wait for a worker.", "N", min=1)
    ] = 256,
    wait: Annotated[
        float,
        _option(
            "Endpoint",
            "How long an answer may wait for blocks that its tenant's quota is full of.",
            "SECONDS",
            min=0,
        ),
    ] = 10.0,
    grace: Annotated[
        float,
        _option(
            "Endpoint", "How long answers may take when this is told to end.", "SECONDS", min=0
        ),
    ] = 30.0,
    connect: Annotated[
        str | None,
        _option(
            "Pool",
            "The service; by default this machine's. Started if none answers.",
            "ADDRESS",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        _option("Pool", "Of the pool, where the service is started.", "SIZE", show_default="2GiB"),
    ] = None,
    block_size: Annotated[
        int | None,
        _option("Pool", "Tokens of a block, likewise.", "TOKENS", show_default="16"),
    ] = None,
    segments: Annotated[
        Path | None,
        _option(
            "Pool",
            "Certificates by which requests may ask for the same tokens at other places, likewise; "
            "see docs/segments.md.",
            "CERTIFICATES",
            show_default="off",
        ),
    ] = None,
    dtype: Annotated[
        str, _option("Workers", "float32 or bfloat16; must be the pool's.", "TYPE")
    ] = "bfloat16",
    threads: Annotated[int, _option("Workers", "Of each worker.", "N", min=1)] = 1,
    weights: Annotated[
        str,
        _option(
            "Workers",
            "packed: in a file that all workers map; int8: likewise, in eight bits; private: in "
            "each worker's memory.",
            "HOW",
        ),
    ] = "packed",
    chunk: Annotated[
        int, _option("Workers", "Tokens computed per step, at most.", "TOKENS", min=1)
    ] = 256,
    max_batch: Annotated[
        int, _option("Workers", "Requests that a worker computes at a time.", "N", min=1)
    ] = 16,
    drafts: Annotated[
        int,
        _option("Workers", "Tokens a step looked up in what was said.", "N", min=0, max=15),
    ] = 0,
    invariant: Annotated[
        bool,
        typer.Option(
            "--invariant",
            help="Every bit of an answer the same in any company, cached or not.",
            show_default=False,
            rich_help_panel="Workers",
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Say what happens in lines of JSON on standard output.",
            show_default=False,
            rich_help_panel="Endpoint",
        ),
    ] = False,
) -> None:
    """Serve a model to OpenAI's clients: several workers on one pool; answers survive a worker.

    Ctrl-C or SIGTERM: nothing new is begun, what runs finishes.  SIGHUP: each worker is replaced by
    a new one, and no answer is lost.

    Example: prefixcache up --workers 3
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in an import: no traceback
    from prefixcache.errors import CacheError
    from prefixcache_serving.notices import Notice, say_to_people, say_to_programs
    from prefixcache_serving.running import Setup, run

    signal.signal(signal.SIGINT, before)

    say = say_to_programs if as_json else say_to_people
    setup = Setup(
        model=model,
        name=name,
        num_workers=workers,
        http=http,
        api_keys=api_keys,
        longest_queue=queue,
        longest_wait_s=wait,
        grace_s=grace,
        target=connect,
        memory=memory,
        block_size=block_size,
        segments=segments,
        dtype=dtype,
        threads=threads,
        weights=weights,
        chunk=chunk,
        max_batch=max_batch,
        drafts=drafts,
        invariant=invariant,
    )
    try:
        raise typer.Exit(run(setup, say))
    except CacheError as error:
        if as_json:  # people are told by whoever has called
            say(Notice("failed", str(error)))
        raise
