"""`prefixcache token`: make a bearer token, and the digest that the file of identities takes."""

from __future__ import annotations

import hashlib
import secrets
import sys
from typing import Annotated

import typer

from prefixcache.cli import view
from prefixcache.errors import InvalidRequest


def token(
    digest_of_stdin: Annotated[
        bool,
        typer.Option("--digest", help="Read a token from stdin instead.", show_default=False),
    ] = False,
    as_json: view.AsJson = False,
) -> None:
    """Make a token for a client, and its digest for the service's file of identities.

    The service needs only the digest; nothing is sent or stored.

    Example: prefixcache token
    """
    made = sys.stdin.read().strip() if digest_of_stdin else secrets.token_urlsafe(32)
    if not made:
        raise InvalidRequest("no token on stdin")
    digest = hashlib.sha256(made.encode()).hexdigest()
    if as_json:
        view.print_json({"token": made, "token_sha256": digest})
        return
    rows = [("client", f"PREFIXCACHE_TOKEN={made}"), ("service", f'token_sha256 = ["{digest}"]')]
    view.print_table(rows[1:] if digest_of_stdin else rows)
