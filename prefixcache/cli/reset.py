"""`prefixcache reset`: make namespaces forget what they have stored."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from prefixcache.cli import view


def reset(
    model: view.Model = None,
    adapter: view.Adapter = "",
    tenant: view.Tenant = "",
    salt: view.Salt = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Reset every namespace.", show_default=False)
    ] = False,
    connect: view.Connect = None,
    as_json: view.AsJson = False,
) -> None:
    """Make a namespace forget all it has stored; leases live on.  Exit code 1: it was empty."""
    with view.open_client(connect) as client:
        if everything:
            chosen = list(client.snapshot().namespaces)
        else:
            chosen = [view.choose_namespace(client, model, adapter, tenant, salt)]
        answers = [(namespace, client.reset(namespace)) for namespace in chosen]
    if as_json:
        view.print_json(
            {
                "namespaces": [
                    view.namespace_fields(namespace) | asdict(answer)
                    for namespace, answer in answers
                ]
            }
        )
    else:
        for namespace, answer in answers:
            typer.echo(
                f"{view.show_namespace(namespace)}: {answer.num_blocks:,} blocks forgotten, "
                f"{answer.num_leased:,} of them still leased"
            )
    if not any(answer.num_blocks for _, answer in answers):
        raise typer.Exit(1)
