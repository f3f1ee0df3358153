"""Sight: which numbers of a snapshot a caller is shown.  Its rows are only those he may see.

An admin, or the one user of a service without identities, sees all.  Everybody else sees the pool's
totals, which he needs to understand a refusal, and otherwise only his own tenant.
"""

from __future__ import annotations

from prefixcache.service.auth.identity import Identity
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


_OTHERS = (
    *("requests", "evicted", "ghosts", "nodes", "waiting", "verbs", "requests_per_s"),
    *("flights_saved", "overshot", "eviction_age_s", "pinned", "shortage"),
    *("shadows", "shadow_dropped", "index_bytes", "history_bytes", "max_history_bytes"),
)
"""Counts of all tenants together that tell what others do."""
