"""What a service tells of itself at one moment: read, as plain values, and as a table."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from prefixcache.cli import view
from prefixcache.texts import many
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


def fields(now: Status) -> dict[str, Any]:
    """Give all of a status as plain values."""
    snapshot, info, pool = now.snapshot, now.info, now.pool
    shown: dict[str, Any] = {
        "ledger": view.ledger_fields(snapshot.ledger),
        "num_leases": snapshot.num_leases,
        "leases": [
            asdict(lease) | {"namespace": view.namespace_fields(lease.namespace)}
            for lease in snapshot.leases
        ],
        "namespaces": [
            view.namespace_fields(namespace) | {"ledger": view.ledger_fields(ledger)}
            for namespace, ledger in snapshot.namespaces.items()
        ],
        "pins": [
            asdict(pin) | {"namespace": view.namespace_fields(pin.namespace)}
            for pin in snapshot.pins
        ],
        "quotas": [view.quota_fields(one, snapshot.block_size) for one in snapshot.quotas],
        "holdings": [asdict(one) for one in snapshot.holdings],
    }
    plain = {f.name: getattr(snapshot, f.name) for f in dataclasses.fields(snapshot)} | shown
    plain["service"] = {
        "version": info.version,
        "core": info.core,
        "pid": info.pid,
        "uptime_s": info.uptime_s,
        "listening": list(info.listening),
        "pool": None if pool is None else asdict(pool) | {"layout": str(pool.layout)},
        "memory_bytes": info.memory_bytes,
        "policy": info.policy,
        "partial": now.partial,
        "ttl_s": info.ttl_s,
        "workers": info.workers,
        "sessions": info.sessions,
        "draining": info.draining,
    }
    plain["workers"] = [
        {field.name: getattr(worker, field.name) for field in worker.DESCRIPTOR.fields}
        for worker in now.workers
    ]
    plain["verbs"] = {
        verb.verb: {
            "count": verb.count,
            "refused": verb.refused,
            "per_s": verb.per_s,
            "p50_s": verb.p50_s if verb.HasField("p50_s") else None,
            "p99_s": verb.p99_s if verb.HasField("p99_s") else None,
        }
        for verb in now.message.verbs
    }
    return plain


def show(now: Status) -> None:
    """Print all of a status."""
    snapshot, info, pool = now.snapshot, now.info, now.pool
    where = "no layout yet" if pool is None else f"{pool.layout} in {pool.name or 'no memory'}"
    if pool is not None and pool.first_block:
        where += f" · {many(pool.first_block, 'block', 'are')} never lent"
    state = "draining" if info.draining else "serving"
    view.print_table(
        [
            ("service", f"{state} for {info.uptime_s:,.0f} s at {', '.join(info.listening)}"),
            ("core", info.core or "pure Python"),
            ("pool", f"{many(snapshot.num_blocks, 'block')} of {snapshot.block_size} · {where}"),
            ("blocks", _blocks(snapshot)),
            *_below(snapshot),
            (
                "workers",
                f"{info.workers:,} · leases {snapshot.num_leases:,} · waiting {snapshot.waiting:,}",
            ),
            *_memory(snapshot),
            ("requests", sums(snapshot)),
            ("tokens", view.show_ledger(snapshot.ledger)),
        ]
    )
    if busy := [one for one in now.workers if view.show_progress(one)]:
        view.tell("workers at work")
        view.print_table(((one.worker, view.show_progress(one)) for one in busy), indent="  ")
    if len(snapshot.namespaces) > 1:
        shown = len(snapshot.namespaces)
        more = snapshot.num_namespaces > shown
        view.tell(f"namespaces: {shown:,} of {snapshot.num_namespaces:,}" if more else "namespaces")
        view.print_table(
            (
                (view.show_namespace(namespace), view.show_ledger(ledger))
                for namespace, ledger in snapshot.namespaces.items()
            ),
            indent="  ",
        )
    if len(snapshot.holdings) > 1:
        view.tell("below the pool, by tenant")
        view.print_table(
            (
                (f"tenant {one.tenant!r}" if one.tenant else "no tenant", view.show_holding(one))
                for one in snapshot.holdings
            ),
            indent="  ",
        )
    if snapshot.leases:
        shown = len(snapshot.leases)
        more = snapshot.num_leases > shown
        view.tell(f"leases: the oldest {shown:,} of {snapshot.num_leases:,}" if more else "leases")
        view.print_table((_LEASE_HEAD, *_lease_rows(snapshot)), indent="  ")


def sums(snapshot: Snapshot) -> str:
    """Write what only grows."""
    return (
        f"{snapshot.requests:,} · evicted blocks {snapshot.evicted:,} · "
        f"remembered {snapshot.ghosts:,}"
    )


def _blocks(snapshot: Snapshot) -> str:
    total = snapshot.num_blocks or 1
    parts = [
        f"{name} {getattr(snapshot, name):,} ({getattr(snapshot, name) / total:.1%})"
        for name in ("free", "private", "indexed", "quarantined")
    ]
    if snapshot.leaving:
        parts.append(f"leaving {snapshot.leaving:,}")
    return " · ".join(parts) + f" · evictable {snapshot.evictable:,}"


def _below(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Write what lies below the pool, if anything may."""
    return [(name, text) for name, text in zip(("below", ""), tiers(snapshot), strict=False)]


def tiers(snapshot: Snapshot) -> list[str]:
    """Write what each tier holds, and what has gone there and come back; nothing, without any."""
    now = snapshot
    lines = []
    moved = f"gone down {now.sunk:,} · come back {now.restored:,} · spoilt {now.spoilt:,}"
    if now.host_blocks:
        share = now.host_used / now.host_blocks
        told = f"host {now.host_used:,} of {now.host_blocks:,} ({share:.1%}) · {moved}"
        lines.append(told + _gain(now.host_advantage))
    if now.disk_blocks:
        share = now.disk_used / now.disk_blocks
        own = f"written {now.disk_written:,} · come back {now.disk_restored:,}"
        told = f"disk {now.disk_used:,} of {now.disk_blocks:,} ({share:.1%}) · "
        if now.disk_found:
            told += f"from before {now.disk_found:,} · "
        lines.append(told + (own if now.host_blocks else moved) + _gain(now.disk_advantage))
    if now.has_remote:
        told = f"remote: stored {now.remote_stored:,} · come back {now.remote_restored:,}"
        for count, what in (
            (now.remote_unstored, "not stored in time"),
            (now.remote_wrong, "wrong"),
            (now.remote_late, "questions not answered in time"),
        ):
            told += f" · {what} {count:,}" if count else ""
        lines.append(told + _gain(now.remote_advantage))
    if lines:
        lines[0] += _declined(now)
    return lines


def _gain(advantage: float) -> str:
    """Write what fetching brings."""
    return f" · computing takes {advantage:,.1f}x as long" if advantage else ""


def _declined(snapshot: Snapshot) -> str:
    """Write how many requests did without what lies below, by why."""
    whys = ("slow", "busy", "room")
    found = {why: count for why in whys if (count := getattr(snapshot, f"declined_{why}"))}
    if not found:
        return ""
    named = ", ".join(f"{why} {count:,}" for why, count in found.items())
    return f" · declined {sum(found.values()):,} ({named})"


def _memory(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Write what the service itself needs: for the index, and for people."""
    if not snapshot.max_history_bytes and not snapshot.index_bytes:
        return []  # it does not say
    from prefixcache.config import format_size

    index, history = snapshot.index_bytes, snapshot.history_bytes
    tokens = snapshot.indexed * snapshot.block_size
    each = f" ({index / tokens:.1f} B a token)" if tokens else ""
    most = format_size(snapshot.max_history_bytes) if snapshot.max_history_bytes else "0"
    return [
        ("memory", f"index {format_size(index)}{each} · history {format_size(history)} of {most}")
    ]


_LEASE_HEAD = ("lease", "worker", "tokens", "committed", "blocks", "ends in", "namespace")


def _lease_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    return [
        (
            str(lease.lease),
            lease.worker,
            f"{lease.num_tokens:,}",
            f"{lease.num_committed:,}",
            f"{lease.num_blocks:,}",
            f"{lease.expires_in_s:.0f} s",
            view.show_namespace(lease.namespace),
        )
        for lease in snapshot.leases
    ]
