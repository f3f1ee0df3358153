"""Redaction: which numbers of a snapshot a caller is shown.  Its rows are only those he may see.

An admin, or the one user of a service without identities, sees all.  Everybody else sees the pool's
totals, which he needs to understand a refusal, and otherwise only his own tenant.
"""

from __future__ import annotations

from prefixcache.service.auth.identity import Identity
from prefixcache.types import COUNTS
from prefixcache.v1 import prefixcache_pb2 as pb


def redact(message: pb.SnapshotResponse, identity: Identity) -> None:
    """Take out of `message` what tells of others than `identity` may see.  O(1).

    Args:
        message: A snapshot that lists only what he may see.
        identity: Who asks.
    """
    for name in _OTHERS:
        message.ClearField(name)
    message.service.workers = len(message.workers)
    message.service.ClearField("sessions")
    message.service.ClearField("listening")
    if not identity.admin:  # they tell of the machine: paths, errors of the system
        message.service.ClearField("failures")
        if message.service.HasField("state"):
            message.service.state.ClearField("folder")
            message.service.state.ClearField("failure")
        message.service.ClearField("disk")


_SHOWN = (
    *("num_blocks", "block_size", "free", "private", "indexed", "quarantined", "leaving"),
    *("evictable", "host_blocks", "disk_blocks"),
    *("max_pinned", "num_leases", "num_namespaces", "ledger"),
)
"""Counts that everybody is shown: the pool's totals, and those that are of his own tenant."""

_OTHERS = (
    *(name for name in COUNTS if name not in _SHOWN),
    *("shortage", "verbs", "requests_per_s", "shadows", "shadow_dropped"),
)
"""What is of all tenants together, and tells what others do."""
