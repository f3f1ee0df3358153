"""`prefixcache lookup`: how much of a prompt is stored."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from prefixcache.cli import prompt, view
from prefixcache.errors import InvalidRequest

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
        return prompt.read_ids(" ".join(tokens), "the arguments")
    if file is None and sys.stdin.isatty():
        raise InvalidRequest("no token ids: give them as arguments, with --file, or on stdin")
    data, source = prompt.read_source("-" if file is None else str(file))
    return prompt.read_ids(data.decode(errors="replace"), source)


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
    """Say how much of a prompt is stored.

    Takes nothing.  Exit code 1: nothing of it.

    Example: prefixcache lookup --file tokens.txt
    """
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
