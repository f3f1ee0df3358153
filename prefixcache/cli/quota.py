"""`prefixcache quota`: what tenants and namespaces may hold, and hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from prefixcache.cli import status, streams, view
from prefixcache.errors import InvalidRequest
from prefixcache.types import Namespace, QuotaInfo, Snapshot

if TYPE_CHECKING:
    from prefixcache.cli.status import Status


def quota(
    max_held: Annotated[
        str | None,
        typer.Option(
            "--max",
            metavar="BLOCKS|SIZE",
            help="Most that its leases may hold, in blocks or as 2GiB, or 'none' for no limit.",
            show_default=False,
        ),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            "--share",
            metavar="BLOCKS|SIZE",
            help="What is evicted only when nobody else's blocks are left.",
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
    elif adapter or salt:
        raise InvalidRequest("--adapter and --salt need --model: together they name a namespace")
    changes = max_held is not None or share is not None
    if scope is None and changes:
        raise InvalidRequest("name whose quota it is, with --tenant or --model")
    most, kept = _read_limit("--max", max_held), _read_limit("--share", share)
    if kept is _NO_LIMIT:
        raise InvalidRequest("--share takes blocks or a size: 0 for none")
    with view.open_client(connect) as client:
        now = status.read(client)
        snapshot = now.snapshot
        if scope is None:
            infos = list(snapshot.quotas)
        else:
            before = client.quota(scope)
            infos = [before]
            if changes:
                infos = [
                    client.set_quota(
                        scope,
                        max_held=before.max_held if most is None else _blocks(most, now),
                        guaranteed=before.guaranteed if kept is None else _blocks(kept, now) or 0,
                    )
                ]
                if not _is_known(scope, snapshot):
                    streams.say(
                        f"the service knows no {_name(infos[0])} yet: the quota is kept for when a "
                        "worker attaches to it"
                    )
    if as_json:
        view.print_json(
            {"quotas": [view.quota_fields(info, snapshot.block_size) for info in infos]}
        )
    elif infos:
        view.print_table([_HEAD, *(_row(info, snapshot.block_size) for info in infos)])
    else:
        view.tell("no quotas: every namespace may hold the whole pool")
    if not infos:
        raise typer.Exit(1)


_HEAD = ("whose", "holds", "tokens", "at most", "stores", "guaranteed")


_NO_LIMIT: Final = "none"
_MOST_DIGITS: Final = 18
"""Of a number of blocks: what 64 bits hold."""


def _read_limit(option: str, text: str | None) -> int | str | None:
    """Read blocks as a number, a size as text that can be read, or `none`."""
    if text is None or text == _NO_LIMIT:
        return text
    if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS:
        return int(text)
    from prefixcache.config import parse_size

    try:
        parse_size(text)
    except ValueError:
        pass
    else:
        if not text[-1].isdecimal():
            return text
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    raise InvalidRequest(
        f"{option} takes a number of blocks, a size such as 2GiB, or 'none', not {shown!r}"
    )


def _blocks(limit: int | str, now: Status) -> int | None:
    if limit == _NO_LIMIT:
        return None
    if isinstance(limit, int):
        return limit
    if not now.block_bytes:
        raise InvalidRequest(
            f"how many blocks {limit} are is not known before a worker has attached: give blocks"
        )
    from prefixcache.config import format_size, parse_size

    size = parse_size(limit)
    if 0 < size < now.block_bytes:
        raise InvalidRequest(f"{limit} is less than one block, of {format_size(now.block_bytes)}")
    return size // now.block_bytes


def _is_known(scope: Namespace | str, snapshot: Snapshot) -> bool:
    if snapshot.num_namespaces > len(snapshot.namespaces):
        return True  # not all are listed
    if isinstance(scope, str):
        return any(one.tenant == scope for one in snapshot.namespaces)
    plain = scope._replace(salt="")  # salts are told to nobody
    return any(one._replace(salt="") == plain for one in snapshot.namespaces)


def _name(info: QuotaInfo) -> str:
    if info.namespace is not None:
        return f"namespace {view.show_namespace(info.namespace)}"
    return f"tenant {info.tenant!r}"


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
