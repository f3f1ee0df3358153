"""`prefixcache pin` and `prefixcache unpin`: what is evicted last, for a time, under a cap."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Annotated

import typer

from prefixcache.cli import decoder as decoding
from prefixcache.cli import source, view
from prefixcache.errors import InvalidRequest
from prefixcache.texts import many
from prefixcache.types import Snapshot

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")


def parse_time(text: str) -> float:
    """Read a duration in seconds.

    Raises:
        InvalidRequest: it is none.

    >>> parse_time("90"), parse_time("1.5h")
    (90.0, 5400.0)
    """
    found = _TIME.fullmatch(text.strip().lower())
    if found is None:
        raise InvalidRequest(f"cannot read the time {text!r}; write for example 90, 30m, 1h or 7d")
    return float(found[1]) * _UNITS[found[2]]


def format_time(seconds: float) -> str:
    """Write a duration for people.

    >>> format_time(5400), format_time(40), format_time(172800)
    ('1.5 h', '40 s', '2 d')
    """
    for unit in ("d", "h", "m"):
        if seconds >= _UNITS[unit]:
            return f"{seconds / _UNITS[unit]:.3g} {unit}"
    return f"{seconds:.0f} s"


def pin(
    what: source.What = None,
    file: source.File = None,
    as_text: source.AsText = False,
    tokenizer: decoding.TokenizerPath = None,
    ttl: Annotated[
        str, typer.Option("--ttl", metavar="TIME", help="How long: 90 (seconds), 30m, 1h, 7d.")
    ] = "1h",
    show: Annotated[
        bool, typer.Option("--list", help="Only show what is pinned.", show_default=False)
    ] = False,
    model: view.Model = None,
    adapter: view.Adapter = "",
    tenant: view.Tenant = "",
    salt: view.Salt = "",
    connect: view.Connect = None,
    as_json: view.AsJson = False,
) -> None:
    """Let what is stored of a prompt be evicted last for a time.  Exit code 1: nothing is stored.

    Pins are wishes, not locks: leases get what they need, also from pinned blocks.

    Example: prefixcache pin --file system-prompt.txt --ttl 8h
    """
    if show:
        view.refuse_beside(
            "--list",
            {"a prompt": what, "--file": file, "--text": as_text, "--tokenizer": tokenizer}
            | {"--model": model, "--adapter": adapter, "--tenant": tenant, "--salt": salt},
        )
        _list(connect, as_json)
        return
    ttl_s, spaces = parse_time(ttl), view.Chosen(model, adapter, tenant, salt)
    asked = source.ask(what, file, as_text, tokenizer, spaces)
    with view.open_client(connect) as client:
        found = source.find(client, asked)
        namespace, packed = found.namespace, source.whole(found)
        answer = client.pin(namespace, packed, ttl_s=ttl_s)
    if as_json:
        view.print_json(asdict(answer) | {"namespace": view.namespace_fields(namespace)})
    elif not answer.num_blocks:
        view.tell(
            f"{view.show_namespace(namespace)}: not one whole block of these {len(packed) // 4:,} "
            "tokens is stored; nothing was pinned"
        )
    else:
        view.tell(
            f"{view.show_namespace(namespace)}: {many(answer.num_blocks, 'block')} "
            f"({answer.num_tokens:,} of {many(len(packed) // 4, 'token')}) pinned for "
            f"{format_time(answer.ttl_s)}, {answer.num_new:,} of them new, "
            f"{answer.num_leased:,} leased now"
        )
        view.tell(_cap(answer.pinned, answer.max_pinned))
    if not answer.num_blocks:
        raise typer.Exit(1)


def unpin(
    what: source.What = None,
    file: source.File = None,
    as_text: source.AsText = False,
    tokenizer: decoding.TokenizerPath = None,
    everything: Annotated[
        bool, typer.Option("--all", help="End all pins of the namespace.", show_default=False)
    ] = False,
    model: view.Model = None,
    adapter: view.Adapter = "",
    tenant: view.Tenant = "",
    salt: view.Salt = "",
    connect: view.Connect = None,
    as_json: view.AsJson = False,
) -> None:
    """End the pin of exactly this prompt, or all pins.  Exit code 1: there was none.

    What was pinned stays cached, in the usual order of eviction.

    Example: prefixcache unpin --all --model tiny
    """
    spaces = view.Chosen(model, adapter, tenant, salt)
    if everything:
        prompt = {"a prompt": what, "--file": file, "--text": as_text, "--tokenizer": tokenizer}
        view.refuse_beside("--all", prompt)
    asked = None if everything else source.ask(what, file, as_text, tokenizer, spaces)
    with view.open_client(connect) as client:
        if asked is None:
            namespace, packed = spaces.named() or spaces.choose(client.snapshot()), b""
        else:
            found = source.find(client, asked)
            namespace, packed = found.namespace, source.whole(found)
        answer = client.unpin(namespace, packed)
        block_size = client.snapshot().block_size
    if as_json:
        fields = {"num_tokens": answer.num_blocks * block_size}
        view.print_json(asdict(answer) | fields | {"namespace": view.namespace_fields(namespace)})
    else:
        view.tell(
            f"{view.show_namespace(namespace)}: {many(answer.num_pins, 'pin')} ended; "
            f"{many(answer.num_blocks, 'block')} "
            f"({many(answer.num_blocks * block_size, 'token')}) are pinned "
            f"no more, {answer.num_leased:,} of them leased now"
        )
        view.tell(_cap(answer.pinned, answer.max_pinned))
    if not answer.num_pins:
        raise typer.Exit(1)


def _cap(pinned: int, max_pinned: int) -> str:
    return f"pinned in all: {pinned:,} of at most {many(max_pinned, 'block')}"


def _list(connect: str | None, as_json: bool) -> None:
    with view.open_client(connect) as client:
        snapshot = client.snapshot()
    if as_json:
        view.print_json(
            {
                "pinned": snapshot.pinned,
                "max_pinned": snapshot.max_pinned,
                "pins": [
                    asdict(pin) | {"namespace": view.namespace_fields(pin.namespace)}
                    for pin in snapshot.pins
                ],
            }
        )
    else:
        view.print_table(_rows(snapshot))
        view.tell(_cap(snapshot.pinned, snapshot.max_pinned))
    if not snapshot.pins:
        raise typer.Exit(1)


def _rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    if not snapshot.pins:
        return []
    head = ("namespace", "tokens", "blocks", "ends in")
    return [
        head,
        *(
            (
                view.show_namespace(one.namespace),
                f"{one.num_tokens:,}",
                f"{one.num_blocks:,}",
                format_time(one.expires_in_s),
            )
            for one in snapshot.pins
        ),
    ]
