"""`prefixcache quota`: what tenants and namespaces may hold, and hold."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from prefixcache.cli import view
from prefixcache.errors import InvalidRequest
from prefixcache.types import Namespace, QuotaInfo


def quota(
    max_held: Annotated[
        str | None,
        typer.Option(
            "--max",
            metavar="BLOCKS",
            help="Most blocks that its leases may hold, or 'none' for no limit.",
            show_default=False,
        ),
    ] = None,
    share: Annotated[
        int | None,
        typer.Option(
            "--share",
            metavar="BLOCKS",
            min=0,
            help="Stored blocks that are evicted only when nobody else's are left.",
            show_default=False,
        ),
    ] = None,
    model: view.Model = None,
    adapter: view.Adapter = "",
    tenant: Annotated[
        str | None,
        typer.Option(
            "--tenant",
            metavar="NAME",
            help="Without --model: all namespaces of this tenant.",
            show_default=False,
        ),
    ] = None,
    salt: view.Salt = "",
    connect: view.Connect = None,
    as_json: view.AsJson = False,
) -> None:
    """Show or set what a tenant or a namespace may hold.  Exit code 1: there is no quota to show.

    Nothing is taken away: who holds more than --max gets nothing new until it holds less.

    Example: prefixcache quota --tenant acme --max 2000 --share 500
    """
    scope: Namespace | str | None = tenant
    if model is not None:
        scope = Namespace(model, adapter, tenant or "", salt)
    changes = max_held is not None or share is not None
    if scope is None and changes:
        raise InvalidRequest("name whose quota it is, with --tenant or --model")
    with view.open_client(connect) as client:
        snapshot = client.snapshot()
        if scope is None:
            infos = list(snapshot.quotas)
        else:
            before = client.quota(scope)
            infos = [before]
            if changes:
                most = before.max_held if max_held is None else _read_limit(max_held)
                kept = before.guaranteed if share is None else share
                infos = [client.set_quota(scope, max_held=most, guaranteed=kept)]
    if as_json:
        view.print_json({"quotas": [quota_fields(info, snapshot.block_size) for info in infos]})
    elif infos:
        view.print_table([_HEAD, *(_row(info, snapshot.block_size) for info in infos)])
    else:
        typer.echo("no quotas: every namespace may hold the whole pool")
    if not infos:
        raise typer.Exit(1)


_HEAD = ("whose", "holds", "tokens", "at most", "stores", "guaranteed")


def _read_limit(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal():
        raise InvalidRequest(f"--max takes a number of blocks, or 'none', not {text!r}")
    return int(text)


def _row(info: QuotaInfo, block_size: int) -> tuple[str, ...]:
    name = f"tenant {info.tenant!r}" if info.tenant else "no tenant"
    return (
        name if info.namespace is None else view.show_namespace(info.namespace),
        f"{info.num_held:,}",
        f"{info.num_held * block_size:,}",
        "no limit" if info.max_held is None else f"{info.max_held:,}",
        f"{info.num_stored:,}",
        f"{info.guaranteed:,}",
    )


def quota_fields(info: QuotaInfo, block_size: int) -> dict[str, Any]:
    """Give the fields of a quota, without the salt of its namespace."""
    space = None if info.namespace is None else view.namespace_fields(info.namespace)
    return asdict(info) | {"namespace": space, "num_held_tokens": info.num_held * block_size}
