"""What a service tells of itself at one moment: the snapshot, how it was started, its workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefixcache.types import PoolHandle, Snapshot

if TYPE_CHECKING:
    from prefixcache.client import Client


@dataclass(frozen=True, slots=True)
class Status:
    """One answer of the service."""

    snapshot: Snapshot
    pool: PoolHandle | None
    """None until the first worker has attached, where the service was started without a layout."""
    info: Any
    """The message `ServiceInfo`."""
    workers: Any
    """The messages `WorkerInfo`."""
    message: Any
    """The whole message."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block; 0 if the layout is not known yet."""
        return 0 if self.pool is None else self.pool.block_bytes

    def memory_of(self, num_blocks: int) -> int:
        """Give the bytes of a pool in which so many blocks can be lent; 0 as `block_bytes`."""
        if self.pool is None:
            return 0
        return (num_blocks + self.pool.first_block) * self.block_bytes

    @property
    def partial(self) -> str:
        """How much of a partly matching block is reused, as `--partial` names it."""
        from prefixcache.v1 import prefixcache_pb2 as pb

        name: str = pb.PartialReuse.Name(self.info.partial)
        return name.removeprefix("PARTIAL_REUSE_").lower()


def read(client: Client) -> Status:
    """Ask for the status.

    Raises:
        ServiceUnavailable: nobody answers.
    """
    from prefixcache.client import codec
    from prefixcache.v1 import prefixcache_pb2 as pb

    message = client.call("snapshot", pb.SnapshotRequest())
    info = message.service
    pool = codec.read_pool(info.pool) if info.HasField("pool") else None
    return Status(codec.read_snapshot(message), pool, info, message.workers, message)
