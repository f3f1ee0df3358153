"""`prefixcache watch`: what enters and leaves the index, as it happens."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prefixcache.cli import view
from prefixcache.plain_json import json_text
from prefixcache.texts import many


def watch(
    connect: view.Connect = None,
    start: Annotated[
        int,
        typer.Option(
            "--from",
            metavar="SEQUENCE",
            min=0,
            max=view.LARGEST_SEQUENCE,
            help="Go on from this event; 0: what is stored now, and then what changes.",
        ),
    ] = 0,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Also token ids, where the service allows it.")
    ] = False,
    model: view.Model = None,
    adapter: view.Adapter = "",
    tenant: view.Tenant = "",
    salt: view.Salt = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line.", show_default=False)
    ] = False,
) -> None:
    """Print events for routers: which whole blocks, by hash, can be found or found no more.

    Never ends by itself; after a lost connection go on with --from and the last number shown.

    Example: prefixcache watch --json | jq -r .event
    """
    only = view.Chosen(model, adapter, tenant, salt).named_or_all()
    with view.open_client(connect) as client:
        try:
            for message in client.watch(start, namespace=only, tokens=tokens):
                for fields in lines(message):
                    view.tell(json_text(fields) if as_json else show(fields))
        except KeyboardInterrupt:
            return


def lines(message: Any) -> list[dict[str, Any]]:
    """Give the fields of each event of a message, and of a gap or the begin of a snapshot."""
    from prefixcache.client import codec
    from prefixcache.types import unpack

    found: list[dict[str, Any]] = []
    if message.gap:
        found.append(
            {"event": "Gap", "from": message.gap_from, "next_sequence": message.next_sequence}
        )
    if message.is_snapshot and not message.events:
        found.append({"event": "Snapshot", "next_sequence": message.next_sequence})
    for event in message.events:
        space = view.namespace_fields(codec.read_namespace(event.namespace))
        del space["salted"]
        fields: dict[str, Any] = {"sequence": event.sequence, "at": event.at, "namespace": space}
        if event.HasField("stored"):
            stored = event.stored
            fields |= {
                "event": "BlockStored",
                "block_hashes": [one.hex() for one in stored.block_hashes],
                "parent_block_hash": stored.parent_block_hash.hex() or None,
                "block_size": stored.block_size,
                "medium": stored.medium,
            }
            if stored.token_ids:
                fields["token_ids"] = unpack(stored.token_ids).tolist()
        elif event.HasField("removed"):
            fields |= {
                "event": "BlockRemoved",
                "block_hashes": [one.hex() for one in event.removed.block_hashes],
                "medium": event.removed.medium,
            }
        else:
            fields["event"] = "AllBlocksCleared"
        found.append(fields | {"next_sequence": message.next_sequence})
    return found


def show(fields: dict[str, Any]) -> str:
    """Write an event for people."""
    if fields["event"] == "Gap":
        return f"gap: events from {fields['from']} on are no longer kept"
    if fields["event"] == "Snapshot":
        return f"what is stored at {fields['next_sequence']}:"
    space = fields["namespace"]
    where = "/".join(part for part in (space["tenant"], space["model"], space["adapter"]) if part)
    text = f"{fields['sequence'] or '·':>16}  {fields['event']:<16}  {where}"
    hashes = fields.get("block_hashes", [])
    if hashes:
        shown = " ".join(one[:12] for one in hashes[:3]) + (" …" if len(hashes) > 3 else "")
        text += f"  {many(len(hashes), 'block')}: {shown}"
    if parent := fields.get("parent_block_hash"):
        text += f"  after {parent[:12]}"
    return text
