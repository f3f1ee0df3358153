"""`prefixcache stat`: the state of the service at this moment."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from typing import Any

import typer

from prefixcache.cli import view
from prefixcache.cli.quota import quota_fields


def stat(connect: view.Connect = None, as_json: view.AsJson = False) -> None:
    """Show what the pool holds, who leases it, and what became of the tokens."""
    from prefixcache.client import codec
    from prefixcache.v1 import prefixcache_pb2 as pb

    with view.open_client(connect) as client:
        message = client.call("snapshot", pb.SnapshotRequest())
    snapshot, info = codec.read_snapshot(message), message.service
    pool = codec.read_pool(info.pool) if info.HasField("pool") else None
    if as_json:
        shown: dict[str, Any] = {
            "ledger": view.ledger_fields(snapshot.ledger),
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
            "quotas": [quota_fields(one, snapshot.block_size) for one in snapshot.quotas],
        }
        fields = {f.name: getattr(snapshot, f.name) for f in dataclasses.fields(snapshot)} | shown
        fields["service"] = {
            "version": info.version,
            "pid": info.pid,
            "uptime_s": info.uptime_s,
            "listening": list(info.listening),
            "pool": None if pool is None else asdict(pool) | {"layout": str(pool.layout)},
            "memory_bytes": info.memory_bytes,
            "policy": info.policy,
            "partial": pb.PartialReuse.Name(info.partial).removeprefix("PARTIAL_REUSE_").lower(),
            "ttl_s": info.ttl_s,
            "workers": info.workers,
            "sessions": info.sessions,
            "draining": info.draining,
        }
        view.print_json(fields)
        return
    where = "no layout yet" if pool is None else f"{pool.layout} in {pool.name or 'no memory'}"
    state = "draining" if info.draining else "serving"
    num_blocks = snapshot.num_blocks
    rows = [
        ("service", f"{state} for {info.uptime_s:,.0f} s at {', '.join(info.listening)}"),
        ("pool", f"{num_blocks:,} blocks of {snapshot.block_size} · {where}"),
        ("blocks", _blocks(snapshot)),
        (
            "workers",
            f"{info.workers:,} · leases {len(snapshot.leases):,} · waiting {snapshot.waiting:,}",
        ),
        (
            "requests",
            f"{snapshot.requests:,} · evicted blocks {snapshot.evicted:,} · "
            f"remembered {snapshot.ghosts:,}",
        ),
        ("tokens", view.show_ledger(snapshot.ledger)),
    ]
    view.print_table(rows)
    if len(snapshot.namespaces) > 1:
        typer.echo("namespaces")
        view.print_table(
            (
                (view.show_namespace(namespace), view.show_ledger(ledger))
                for namespace, ledger in snapshot.namespaces.items()
            ),
            indent="  ",
        )
    if snapshot.leases:
        typer.echo("leases")
        head = ("lease", "worker", "tokens", "committed", "blocks", "ends in", "namespace")
        lines = [
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
        view.print_table((head, *lines), indent="  ")


def _blocks(snapshot: Any) -> str:
    total = snapshot.num_blocks or 1
    parts = [
        f"{name} {getattr(snapshot, name):,} ({getattr(snapshot, name) / total:.1%})"
        for name in ("free", "private", "indexed", "quarantined")
    ]
    return " · ".join(parts) + f" · evictable {snapshot.evictable:,}"
