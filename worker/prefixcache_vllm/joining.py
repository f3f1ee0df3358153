"""How a process of vLLM's joins the service: the engine's core, which leases, and its workers."""

from __future__ import annotations

import os
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
