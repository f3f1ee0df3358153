"""`prefixcache token`: make a bearer token, and the digest that the file of identities takes."""

from __future__ import annotations

import hashlib
import secrets
import sys
from typing import Annotated, Final

import typer

from prefixcache.cli import view
from prefixcache.errors import InvalidRequest

_LONGEST: Final = 4096
"""Bytes of a token: gRPC takes some 8 KiB of metadata in all."""


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
    made = _read() if digest_of_stdin else secrets.token_urlsafe(32)
    digest = hashlib.sha256(made.encode()).hexdigest()
    if as_json:
        view.print_json({"token": made, "token_sha256": digest})
        return
    rows = [("client", f"PREFIXCACHE_TOKEN={made}"), ("service", f'token_sha256 = ["{digest}"]')]
    view.print_table(rows[1:] if digest_of_stdin else rows)


def _read() -> str:
    """Read a token that a client can send: its digest is of no use if none can."""
    try:
        given = sys.stdin.buffer.read(_LONGEST + 1).decode("ascii").strip()
    except UnicodeDecodeError:
        raise InvalidRequest("the token on stdin is not all ASCII: no client can send it") from None
    if not given:
        raise InvalidRequest("no token on stdin")
    if len(given) >= _LONGEST:
        raise InvalidRequest(f"what is on stdin has more than {_LONGEST:,} bytes: that is no token")
    if any(char.isspace() or not char.isprintable() for char in given):
        raise InvalidRequest(
            "the token on stdin has a space, a line's end or a control character in it: no client "
            "can send it"
        )
    return given
