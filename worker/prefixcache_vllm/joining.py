"""How a process of vLLM's joins the service: the engine's core, which leases, and its workers."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, Final

import prefixcache
from prefixcache.client import Client, Session
from prefixcache.errors import Unsupported
from prefixcache.texts import many
from prefixcache.types import PoolHandle
from prefixcache_vllm import pages
from prefixcache_vllm.options import Options

FIRST_BLOCK: Final = 1
"""What vLLM's block tables call no block, and its kernels may write to, is 0."""
SCHEDULERS: Final = "prefixcache_vllm.scheduler"
WORKERS: Final = "prefixcache_vllm.worker"
"""Where the classes are that vLLM is started with, in place."""


def group_of(vllm_config: Any, times: int = 0) -> str:
    """Name the processes of one engine: its core leases blocks, and its workers write to them.

    Each engine makes up a number for itself, which all of its processes are told.

    Args:
        vllm_config: of the engine.
        times: how often it has joined again.  Each time they are another group: when all have left
            the former one, nobody writes any more to what was leased in it.
    """
    transfer = vllm_config.kv_transfer_config
    parts = ["vllm", vllm_config.instance_id, None if transfer is None else transfer.engine_id]
    return "-".join(str(part) for part in (*parts, times) if part)


def join(
    vllm_config: Any, kv_cache_config: Any, role: str, *, in_place: bool, group: str = ""
) -> tuple[Client, Session]:
    """Attach to the service, with the layout of vLLM's KV.  Whoever calls it closes the client.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        kv_cache_config: vLLM's `KVCacheConfig`, with the order it has settled on.
        role: for people: appears in snapshots.
        in_place: whether vLLM computes in the pool itself.
        group: of the engine's processes; by default the one they join in first.

    Raises:
        Unsupported: settings or a model that cannot be served; all of them are named.
        LayoutMismatch: the pool holds another format, or blocks of another size.
        ServiceUnavailable: nobody serves there.
    """
    pages.check(vllm_config, in_place=in_place)
    if in_place:
        check_both(vllm_config)
    client = prefixcache.connect(Options.of(vllm_config).connect)
    try:
        return client, attach(
            client, vllm_config, kv_cache_config, role, in_place=in_place, group=group
        )
    except BaseException:
        client.close()
        raise


def attach(
    client: Client,
    vllm_config: Any,
    kv_cache_config: Any,
    role: str,
    *,
    in_place: bool,
    group: str = "",
) -> Session:
    """Attach once more, by a client that `join` has made, and in another group.

    Raises:
        CacheError: as `join`.
    """
    session = client.attach(
        pages.model_of(vllm_config, Options.of(vllm_config).weights),
        pages.layout_of(vllm_config, kv_cache_config),
        block_size=pages.only_spec(kv_cache_config).block_size,
        name=f"vllm-{role}-{os.getpid()}",
        group=group or group_of(vllm_config),
    )
    if in_place and session.pool.first_block != FIRST_BLOCK:
        session.close()
        raise Unsupported(
            f"the pool lends from block {session.pool.first_block} on, and vLLM writes to block"
            f" 0 what nobody reads: start the service with --first-block {FIRST_BLOCK}"
        )
    return session


def check_both(vllm_config: Any) -> None:
    """Refuse an engine in place of which one half is not ours.

    A scheduler of vLLM's own would give requests blocks of the pool that others hold, and a worker
    of its own has nothing of what others have computed.

    Raises:
        Unsupported: As said, with the flag that is missing.
    """
    scheduler = vllm_config.scheduler_config.scheduler_cls
    worker = vllm_config.parallel_config.worker_cls
    for flag, named, module, example in (
        ("--scheduler-cls", scheduler, SCHEDULERS, "LeaseScheduler"),
        ("--worker-cls", worker, WORKERS, "CPUWorker"),
    ):
        if not is_of(module, named):
            raise Unsupported(
                f"in place, scheduler and worker go together, and {flag} is {named}: say {flag} "
                f"{module}.{example}, or start the engine by `prefixcache vllm`"
            )


def is_of(module: str, named: str | type | None) -> bool:
    """Whether a class is one of a module, or derived from one; it may be told by its dotted name.

    >>> is_of("pathlib", "pathlib.Path"), is_of("json.encoder", "json.JSONEncoder")
    (True, True)
    >>> is_of("pathlib", None), is_of("pathlib", "json.JSONEncoder"), is_of("pathlib", "auto")
    (False, False, False)
    """
    if isinstance(named, str):
        place, _, name = named.rpartition(".")
        if place in ("", module):  # without importing what is heavy
            return bool(place)
        named = getattr(import_module(place), name)
    return any(base.__module__ == module for base in getattr(named, "__mro__", ()))


def check_room(pool: PoolHandle, max_tokens: int, spare_blocks: int) -> None:
    """Refuse an engine whose longest request would wait for ever for blocks.

    Raises:
        Unsupported: As said, with what to do.
    """
    needed = -(-max_tokens // pool.block_size)
    usable = pool.num_blocks - pool.first_block - spare_blocks
    if needed > usable:
        raise Unsupported(
            f"a request of --max-model-len {max_tokens:,} needs {many(needed, 'block')} of "
            f"{pool.block_size} tokens, and the pool lends {usable:,} beside {spare_blocks:,} that "
            "are spare: give the service more memory, or vLLM a smaller --max-model-len"
        )
