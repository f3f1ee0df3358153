"""Sight: what of a snapshot a caller is shown.

An admin, or the one user of a service without identities, sees all.  Everybody else sees the pool's
totals, which he needs to understand a refusal, and otherwise only his own tenant.
"""

from __future__ import annotations

from typing import Any

from prefixcache.client import codec
from prefixcache.core.ledger import Tally
from prefixcache.service.identities import Identity
from prefixcache.v1 import prefixcache_pb2 as pb


def narrow(message: pb.SnapshotResponse, identity: Identity) -> None:
    """Take out of `message` what `identity` may not see.  O(what is in it).

    Args:
        message: A snapshot, of everybody's leases and of its own tenant's workers.
        identity: Who asks.
    """

    def is_own(entry: Any) -> bool:
        return identity.sees(codec.read_namespace(entry.namespace))

    for field in (message.leases, message.namespaces, message.pins, message.flights):
        _keep(field, is_own)
    _keep(
        message.quotas,
        lambda quota: (
            is_own(quota)
            if quota.HasField("namespace")
            else identity.admin or quota.tenant == identity.tenant
        ),
    )
    total = Tally()
    for entry in message.namespaces:
        total.add(codec.read_ledger(entry.ledger))
    message.ledger.Clear()
    codec.write_ledger(total.total(), message.ledger)
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


def _keep(field: Any, wanted: Any) -> None:
    kept = [entry for entry in field if wanted(entry)]
    if len(kept) != len(field):
        del field[:]
        field.extend(kept)


_OTHERS = (
    *("requests", "evicted", "ghosts", "nodes", "waiting", "verbs", "requests_per_s"),
    *("flights_saved", "overshot", "eviction_age_s", "pinned", "shortage"),
    *("shadows", "shadow_dropped"),
)
"""Counts of all tenants together that tell what others do."""
