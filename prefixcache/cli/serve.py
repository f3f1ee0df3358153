"""`prefixcache serve`: start the service in the foreground."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixcache.cli import streams
from prefixcache.cli.codes import EXIT_REFUSED
from prefixcache.errors import NotFound, PoolExhausted, ServiceUnavailable

_POOL = "Pool"
_SERVICE = "Service"
_ACCESS = "Access"
_LIMITS = "Limits"


def _option(panel: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(help=text, metavar=metavar, rich_help_panel=panel, show_default=False)


def serve(
    memory: Annotated[
        str | None, _option(_POOL, "Memory of the pool. Default: 2GiB.", "SIZE")
    ] = None,
    block_size: Annotated[
        int | None, _option(_POOL, "Tokens of a block, a power of two. Default: 16.", "TOKENS")
    ] = None,
    layout: Annotated[
        str | None,
        _option(
            _POOL,
            "Layers x KV heads x head size and the type, e.g. 30x3x64:bfloat16; or, where the "
            "order of the bytes is not ours, pages:PLANESxPAGE_BYTES:FORMAT. Default: that of the "
            "first worker.",
            "LAYOUT",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        _option(
            _POOL,
            "Folder whose config.json tells the layout, or the name of a model in a cache of this "
            "machine.",
            "MODEL",
        ),
    ] = None,
    dtype: Annotated[
        str | None, _option(_POOL, "Element type, if not the one in config.json.", "TYPE")
    ] = None,
    first_block: Annotated[
        int | None,
        _option(
            _POOL,
            "The first block that is ever lent: 1 for engines in which block 0 stands for none. "
            "Default: 0.",
            "BLOCK",
        ),
    ] = None,
    policy: Annotated[
        str | None, _option(_POOL, "Order of eviction. Default: lru.", "NAME")
    ] = None,
    partial: Annotated[
        str | None,
        _option(_POOL, "Reuse inside a block: off, blocks or tails. Default: tails.", "MODE"),
    ] = None,
    ghosts: Annotated[
        int | None,
        _option(_POOL, "Evicted blocks to remember. Default: as many as blocks.", "BLOCKS"),
    ] = None,
    history: Annotated[
        str | None,
        _option(
            _POOL,
            "Memory in which past requests are remembered, for explain and the stats; "
            "0 remembers none. Default: 1MiB.",
            "SIZE",
        ),
    ] = None,
    pool: Annotated[
        str | None,
        _option(
            _POOL,
            "shm, cuda (one GPU; needs --model or --layout), or none to keep accounts without "
            "memory. Default: shm.",
            "KIND",
        ),
    ] = None,
    device: Annotated[
        int | None, _option(_POOL, "The GPU of a cuda pool. Default: 0.", "N")
    ] = None,
    pin_cap: Annotated[
        float | None,
        _option(_POOL, "Share of the pool that may be pinned, 0 to 1. Default: 0.25.", "SHARE"),
    ] = None,
    listen: Annotated[
        list[str] | None,
        _option(_SERVICE, "unix:PATH or 127.0.0.1:PORT; may be repeated.", "ADDRESS"),
    ] = None,
    identities: Annotated[
        Path | None,
        _option(_ACCESS, "Who may use which namespaces (TOML); see SECURITY.md.", "FILE"),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        _option(_ACCESS, "Certificate chain for TCP; read again when it changes.", "PEM"),
    ] = None,
    tls_key: Annotated[Path | None, _option(_ACCESS, "Its key.", "PEM")] = None,
    tls_ca: Annotated[
        Path | None,
        _option(_ACCESS, "Demand client certificates that this authority signed.", "PEM"),
    ] = None,
    ttl: Annotated[
        float | None,
        _option(_SERVICE, "Life of a lease without a heartbeat. Default: 30.", "SECONDS"),
    ] = None,
    quarantine: Annotated[
        float | None,
        _option(
            _SERVICE,
            "After this long the blocks of a lost worker come back, if its process cannot be "
            "watched (another host or container). Default: 300.",
            "SECONDS",
        ),
    ] = None,
    grace: Annotated[
        float | None,
        _option(_SERVICE, "Time for leases to come back at the end. Default: 30.", "SECONDS"),
    ] = None,
    state: Annotated[
        Path | None,
        _option(
            _SERVICE,
            "Keep pool and index in this folder, so that the next start finds what was stored. In "
            "/dev/shm they outlive the service, on a disk also a reboot.",
            "DIR",
        ),
    ] = None,
    record: Annotated[
        Path | None,
        _option(
            _SERVICE,
            "Write the live requests to this new file, as a trace for replay and sweep; "
            "gzip if it ends in .gz.",
            "FILE",
        ),
    ] = None,
    anonymise: Annotated[
        bool | None,
        _option(
            _SERVICE,
            "Record other token ids and names in place of the real ones; "
            "every common prefix keeps its length. Default: off.",
        ),
    ] = None,
    http: Annotated[
        str | None,
        _option(
            _SERVICE,
            "Serve /metrics and the live page at 127.0.0.1:PORT; readable by every user of this "
            "machine. Default: off.",
            "ADDRESS",
        ),
    ] = None,
    http_tokens: Annotated[
        bool | None,
        _option(
            _SERVICE, "Let the page show token ids to every user of this machine. Default: off."
        ),
    ] = None,
    watch_tokens: Annotated[
        bool | None,
        _option(_SERVICE, "Let who watches events ask for token ids. Default: off."),
    ] = None,
    events: Annotated[
        str | None,
        _option(
            _SERVICE,
            "Publish events over ZeroMQ for prefix-aware routers: tcp://127.0.0.1:PORT or "
            "ipc://PATH. Default: off.",
            "ENDPOINT",
        ),
    ] = None,
    events_replay: Annotated[
        str | None,
        _option(_SERVICE, "Give published events again at this ZeroMQ endpoint.", "ENDPOINT"),
    ] = None,
    shadow: Annotated[
        list[str] | None,
        _option(
            _SERVICE,
            "Also try another configuration on the live requests, in a process of its own, e.g. "
            "policy=slru,block_size=32 or memory=4GiB; up to 4. See prefixcache what-if.",
            "SPEC",
        ),
    ] = None,
    trace: Annotated[
        str | None,
        _option(
            _SERVICE,
            "Send OpenTelemetry spans to this collector (OTLP over gRPC), e.g. "
            "http://127.0.0.1:4317. Default: off.",
            "URL",
        ),
    ] = None,
    reflection: Annotated[
        bool | None, _option(_SERVICE, "Let gRPC clients ask what there is. Default: on.")
    ] = None,
    log_level: Annotated[
        str | None, _option(_SERVICE, "debug, info, warning or error. Default: info.", "LEVEL")
    ] = None,
    max_message: Annotated[
        str | None, _option(_LIMITS, "Bytes of one message. Default: 16MiB.", "SIZE")
    ] = None,
    max_ops: Annotated[
        int | None, _option(_LIMITS, "Ops of one message. Default: 4096.", "N")
    ] = None,
    max_forks: Annotated[
        int | None, _option(_LIMITS, "Children of one fork. Default: 1024.", "N")
    ] = None,
    max_wait: Annotated[
        float | None, _option(_LIMITS, "Longest wait of one request. Default: 600.", "SECONDS")
    ] = None,
    max_waiting: Annotated[
        int | None, _option(_LIMITS, "Waiting requests of one worker. Default: 1024.", "N")
    ] = None,
    max_line: Annotated[
        int | None, _option(_LIMITS, "Requests that wait for room, in all. Default: 4096.", "N")
    ] = None,
    max_pin: Annotated[
        float | None, _option(_LIMITS, "Longest time of one pin. Default: 604800.", "SECONDS")
    ] = None,
    max_workers: Annotated[
        int | None, _option(_LIMITS, "Workers at the same time. Default: 1024.", "N")
    ] = None,
    max_shadow_lag: Annotated[
        str | None,
        _option(_LIMITS, "Bytes that may wait for the shadow caches. Default: 64MiB.", "SIZE"),
    ] = None,
    max_watchers: Annotated[
        int | None, _option(_LIMITS, "Watchers of events at the same time. Default: 64.", "N")
    ] = None,
    max_leases: Annotated[
        int | None, _option(_LIMITS, "Leases at the same time. Default: 65536.", "N")
    ] = None,
    max_namespaces: Annotated[
        int | None, _option(_LIMITS, "Namespaces at the same time. Default: 16384.", "N")
    ] = None,
    max_calls: Annotated[
        int | None, _option(_LIMITS, "Calls and sessions at the same time. Default: 8192.", "N")
    ] = None,
) -> None:
    """Start the service: it owns the pool and lends its blocks to workers.

    Every option is also an environment variable, PREFIXCACHE_MEMORY and so on; options win.  The
    first Ctrl-C (or SIGTERM) lets leases come back before it ends, the second ends it at once.

    Example: prefixcache serve --memory 8GiB --model /models/my-model
    """
    flags = dict(locals())
    # Imported here: other commands start without the service and its libraries.
    from prefixcache.config import load
    from prefixcache.service.server import run

    try:
        raise typer.Exit(run(load(flags), _announce))
    except (ServiceUnavailable, PoolExhausted, NotFound) as error:
        streams.say(str(error))
        raise typer.Exit(EXIT_REFUSED) from None


def _announce(line: str) -> None:
    with contextlib.suppress(OSError):  # who reads it may go, and the service stays
        typer.echo(line)
