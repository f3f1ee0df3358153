"""`prefixcache lookup`: how much of a prompt is stored."""

from __future__ import annotations

from dataclasses import asdict

import typer

from prefixcache.cli import decoder as decoding
from prefixcache.cli import source, view
from prefixcache.texts import many


def lookup(
    what: source.What = None,
    file: source.File = None,
    as_text: source.AsText = False,
    tokenizer: decoding.TokenizerPath = None,
    model: view.Model = None,
    adapter: view.Adapter = "",
    tenant: view.Tenant = "",
    salt: view.Salt = "",
    connect: view.Connect = None,
    as_json: view.AsJson = False,
) -> None:
    """Say how much of a prompt is stored.

    Takes nothing.  Exit code 1: nothing of it.

    Example: prefixcache lookup prompt.txt --tokenizer /models/my-model
    """
    spaces = view.Chosen(model, adapter, tenant, salt)
    asked = source.ask(what, file, as_text, tokenizer, spaces)
    with view.open_client(connect) as client:
        found = source.find(client, asked)
        namespace = found.namespace
        answer = client.lookup(namespace, source.whole(found))
    if as_json:
        view.print_json(asdict(answer) | {"namespace": view.namespace_fields(namespace)})
    else:
        view.tell(
            f"{answer.num_hit + answer.num_partial:,} of "
            f"{many(answer.num_tokens, 'token', 'are')} stored: "
            f"{answer.num_hit:,} in whole blocks, {answer.num_partial:,} in part of one"
        )
        if answer.num_pending:
            view.tell(f"{answer.num_pending:,} more are being computed now")
    if not answer.num_hit + answer.num_partial:
        raise typer.Exit(1)
