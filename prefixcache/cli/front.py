"""What a front of `prefixcache up` says of its workers, over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import socket
from typing import Any, Final

from prefixcache.client.address import Address
from prefixcache.errors import InvalidRequest, ServiceUnavailable

KEY_VARIABLE: Final = "OPENAI_API_KEY"
"""Where the API key is looked for."""
_TIMEOUT_S: Final = 5.0
_LONGEST: Final = 1 << 22


def read_front_address(given: str) -> Address:
    """Read where a front is: an address, or the URL that `prefixcache up` tells its clients.

    Raises:
        InvalidRequest: it is neither.

    >>> print(read_front_address("127.0.0.1:8000"), read_front_address("http://127.0.0.1:8000/v1/"))
    127.0.0.1:8000 127.0.0.1:8000
    """
    rest = given.removeprefix("http://")
    return Address.parse(rest if rest == given else rest.removesuffix("/").removesuffix("/v1"))


def read_key(given: str, where: str) -> str:
    """Read an API key; empty if there is none.

    Args:
        given: with or without a line's end, as files have it.
        where: it is from.

    Raises:
        InvalidRequest: it could not stand in a header; the message does not repeat it.
    """
    key = given.strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InvalidRequest(
            f"{where} holds no API key: keys are of printable ASCII signs, without spaces"
        )
    return key


class FrontConnection(http.client.HTTPConnection):
    """To an address, which may be a Unix socket.

    Args:
        address: of the front.
        timeout_s: how long it may say nothing.
    """

    def __init__(self, address: Address, timeout_s: float) -> None:
        super().__init__(address.host or "localhost", address.port or None, timeout=timeout_s)
        self._path = address.path

    def connect(self) -> None:
        """Connect."""
        if not self._path:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def read_front(address: Address) -> dict[str, Any]:
    """Ask a front for its workers, the queue, and what is under way.

    Raises:
        ServiceUnavailable: nobody answers there, or somebody else.
        InvalidRequest: it wants a key, or another one; or what should be one is none.
    """
    headers = {}
    if key := read_key(os.environ.get(KEY_VARIABLE, ""), f"${KEY_VARIABLE}"):
        headers["authorization"] = f"Bearer {key}"
    connection = FrontConnection(address, _TIMEOUT_S)
    try:
        connection.request("GET", "/workers", headers=headers)
        answer = connection.getresponse()
        told = json.loads(answer.read(_LONGEST))
        if answer.status == 401:
            raise InvalidRequest(f"the front at {address} wants an API key, in ${KEY_VARIABLE}")
        _check(told)
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise ServiceUnavailable(
            f"no front of `prefixcache up` answers at {address} ({error or type(error).__name__})"
        ) from None
    finally:
        connection.close()
    return dict(told)


def _check(told: dict[str, Any]) -> None:
    """See that all is there that is shown; whoever else listens there may say anything.

    Raises:
        TypeError, KeyError: it is not.
    """
    counted = [told[name] for name in ("waiting", "longest_queue", "moved", "tokens_per_s")]
    named = [one[name] for one in told["workers"] for name in ("worker", "state")]
    _ = told["is_draining"]
    for one in told["workers"]:
        if one["state"] != "starting":
            counted += [one[name] for name in ("running", "seats", "tokens_per_s", "pid")]
    if not all(isinstance(one, int | float) for one in counted):
        raise TypeError("it says no numbers")
    if not all(isinstance(one, str) for one in named):
        raise TypeError("its workers have no names")
