"""`prefixcache lookup` and `prefixcache explain`: what of a prompt is stored, and why not more."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from prefixcache.cli import view
from prefixcache.errors import InvalidRequest
from prefixcache.types import pack, unpack

Tokens = Annotated[
    list[str] | None,
    typer.Argument(metavar="[TOKEN]...", help="Token ids. Without any: --file or stdin."),
]
File = Annotated[
    Path | None,
    typer.Option(
        "--file", "-f", metavar="PATH", help="Read token ids from a file.", show_default=False
    ),
]


def read_tokens(tokens: list[str] | None, file: Path | None) -> bytes:
    """Read token ids from arguments, a file or stdin: numbers with anything but digits between.

    Raises:
        InvalidRequest: there are none, or something is not a token id.
    """
    if tokens:
        text, source = " ".join(tokens), "the arguments"
    elif file is not None and str(file) != "-":
        try:
            text, source = file.read_text(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"cannot read {file}: {error}") from None
    elif file is not None or not sys.stdin.isatty():
        text, source = sys.stdin.read(), "stdin"
    else:
        raise InvalidRequest("no token ids: give them as arguments, with --file, or on stdin")
    words = re.sub(r"[\[\],;\s]+", " ", text).split()
    if not words:
        raise InvalidRequest(f"no token ids in {source}")
    try:
        return pack([int(word) for word in words])
    except ValueError:
        bad = next(word for word in words if not word.isdecimal())
        raise InvalidRequest(f"{bad!r} in {source} is not a token id") from None
    except OverflowError:
        raise InvalidRequest(f"a token id in {source} is not a number of 32 bits") from None


def lookup(
    tokens: Tokens = None,
    file: File = None,
    model: view.Model = None,
    adapter: view.Adapter = "",
    tenant: view.Tenant = "",
    salt: view.Salt = "",
    connect: view.Connect = None,
    as_json: view.AsJson = False,
) -> None:
    """Say how much of a prompt is stored.  Takes nothing.  Exit code 1: nothing of it."""
    packed = read_tokens(tokens, file)
    with view.open_client(connect) as client:
        namespace = view.choose_namespace(client, model, adapter, tenant, salt)
        answer = client.lookup(namespace, packed)
    if as_json:
        view.print_json(asdict(answer) | {"namespace": view.namespace_fields(namespace)})
    else:
        typer.echo(
            f"{answer.num_hit + answer.num_partial:,} of {answer.num_tokens:,} tokens are stored: "
            f"{answer.num_hit:,} in whole blocks, {answer.num_partial:,} in part of one"
        )
        if answer.num_pending:
            typer.echo(f"{answer.num_pending:,} more are being computed now")
    if not answer.num_hit + answer.num_partial:
        raise typer.Exit(1)


def explain(
    tokens: Tokens = None,
    file: File = None,
    model: view.Model = None,
    adapter: view.Adapter = "",
    tenant: view.Tenant = "",
    salt: view.Salt = "",
    connect: view.Connect = None,
    as_json: view.AsJson = False,
) -> None:
    """Say why each token of a prompt would or would not be reused.  Exit code 1: none would."""
    packed = read_tokens(tokens, file)
    with view.open_client(connect) as client:
        namespace = view.choose_namespace(client, model, adapter, tenant, salt)
        answer = client.explain(namespace, packed)
    stored = unpack(answer.stored_next).tolist()
    if as_json:
        view.print_json(
            {
                "namespace": view.namespace_fields(namespace),
                "spans": [asdict(span) for span in answer.spans],
                "ledger": view.ledger_fields(answer.ledger),
                "parted_at": answer.parted_at,
                "stored_next": stored,
                "num_parted": answer.num_parted,
            }
        )
    else:
        typer.echo(view.show_ledger(answer.ledger))
        view.print_table(
            (
                (
                    f"tokens {span.start:,} to {span.end - 1:,}",
                    f"{span.end - span.start:,}",
                    span.fate,
                )
                for span in answer.spans
            ),
            indent="  ",
        )
        if answer.parted_at is not None:
            mine = unpack(packed).tolist()[answer.parted_at : answer.parted_at + 8]
            typer.echo(f"parts from the closest stored prompt at token {answer.parted_at:,}")
            view.print_table(
                (("yours", _row(mine)), ("stored", _row(stored))),
                indent="  ",
            )
            typer.echo(f"  {answer.num_parted:,} requests have parted from the stored ones there")
    if not answer.ledger.reused:
        raise typer.Exit(1)


def _row(tokens: list[int]) -> str:
    return " ".join(map(str, tokens)) or "(ends)"
