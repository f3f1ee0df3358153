"""`prefixcache reset`: make namespaces forget what they have stored."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from prefixcache.cli import view
from prefixcache.errors import NotFound
from prefixcache.texts import many
from prefixcache.types import Namespace, Reset

if TYPE_CHECKING:
    from prefixcache.client import Client


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
    """Make a namespace forget all it has stored; leases live on.  Exit code 1: it was empty.

    Blocks that leases still hold come back when those end.

    Example: prefixcache reset --model tiny
    """
    if everything:
        named = {"--model": model, "--adapter": adapter, "--tenant": tenant, "--salt": salt}
        view.refuse_beside("--all", named)
    with view.open_client(connect) as client:
        if everything:
            answers = _reset_all(client)
        else:
            namespace = view.choose_namespace(client, model, adapter, tenant, salt)
            answers = [(namespace, client.reset(namespace))]
        block_size = client.snapshot().block_size
    if as_json:
        view.print_json(
            {
                "namespaces": [
                    view.namespace_fields(namespace)
                    | asdict(answer)
                    | {"max_tokens": answer.num_blocks * block_size}
                    for namespace, answer in answers
                ]
            }
        )
    else:
        for namespace, answer in answers:
            view.tell(
                f"{view.show_namespace(namespace)}: {many(answer.num_blocks, 'block')} (up to "
                f"{many(answer.num_blocks * block_size, 'token')}) forgotten, "
                f"{many(answer.num_pins, 'pin')} ended; "
                f"{many(answer.num_leased, 'block')} still held by "
                f"{many(answer.num_leases, 'lease')}"
            )
    if not any(answer.num_blocks for _, answer in answers):
        raise typer.Exit(1)


def _reset_all(client: Client) -> list[tuple[Namespace, Reset]]:
    """Reset all namespaces: those that are listed, then those that are listed in their place.

    What lies on disk, or in a store of other machines, is reset under whatever names it is there.
    """
    answers: dict[Namespace, Reset] = {}
    while True:
        told = client.snapshot()
        if not (fresh := [one for one in told.namespaces if one not in answers]):
            break
        answers |= {namespace: client.reset(namespace) for namespace in fresh}
    client.reset_unnamed()  # on disk or elsewhere there may be some that no list has
    if (left := told.num_namespaces - len(told.namespaces)) > 0:
        raise NotFound(
            f"{many(len(answers), 'namespace')} reset, and {left:,} of too long a name to be "
            "listed were not: name them, or reset again when the others have gone"
        )
    return list(answers.items())
