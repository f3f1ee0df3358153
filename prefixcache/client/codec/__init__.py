"""Words to messages and back: the one place that knows the dataclasses and the protobuf fields.

`write_*` fill a message in place (a sub-message is never copied), `read_*` give the word back.  The
service writes answers, the clients read them.  Token and block ids are moved as one buffer: nothing
here loops over tokens or blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from prefixcache.client.codec.admin import (
    read_check,
    read_quota,
    write_quota,
)
from prefixcache.client.codec.errors import (
    FOREIGN_ERRORS,
    STATUS_CODES,
    check_flag,
    check_seconds,
    make_error,
    no_foreign_errors,
    put,
    read_error,
    write_error,
)
from prefixcache.client.codec.inspect import (
    ORDERS,
    read_explain,
    read_order,
    read_outline,
    read_snapshot,
    write_explain,
    write_outline,
    write_snapshot,
)
from prefixcache.client.codec.leases import (
    read_acquire,
    read_attach,
    read_commit,
    read_detach,
    read_fork,
    read_nothing,
    read_release,
    read_renew,
    read_update,
    write_acquire,
    write_commit,
    write_detach,
    write_fork,
    write_nothing,
    write_release,
    write_renew,
    write_update,
)
from prefixcache.client.codec.words import (
    PARTIALS,
    POOL_KINDS,
    read_again,
    read_fields,
    read_layout,
    read_namespace,
    read_pool,
    seal,
    show_namespace,
    write_again,
    write_fields,
    write_layout,
    write_namespace,
    write_pool,
)
from prefixcache.types import Lookup, Pinned, Reset, Unpinned

__all__ = [
    "FOREIGN_ERRORS",
    "ORDERS",
    "PARTIALS",
    "POOL_KINDS",
    "READ",
    "STATUS_CODES",
    "WRITE",
    "check_flag",
    "check_seconds",
    "make_error",
    "no_foreign_errors",
    "put",
    "read_again",
    "read_attach",
    "read_error",
    "read_layout",
    "read_namespace",
    "read_order",
    "read_outline",
    "read_pool",
    "read_snapshot",
    "seal",
    "show_namespace",
    "write_again",
    "write_error",
    "write_layout",
    "write_namespace",
    "write_outline",
    "write_pool",
    "write_snapshot",
]

WRITE: Final[dict[str, Callable[[Any, Any], None]]] = {
    "acquire": write_acquire,
    "cancel": write_nothing,
    "commit": write_commit,
    "extend": write_update,
    "fork": write_fork,
    "truncate": write_update,
    "release": write_release,
    "renew": write_renew,
    "detach": write_detach,
    "lookup": write_fields,
    "explain": write_explain,
    "reset": write_fields,
    "pin": write_fields,
    "unpin": write_fields,
    "quota": write_quota,
}
"""How the service writes the answer of each verb (attach and snapshot carry more)."""

READ: Final[dict[str, Callable[[Any], Any]]] = {
    "attach": lambda message: message,
    "acquire": read_acquire,
    "cancel": read_nothing,
    "check": read_check,
    "commit": read_commit,
    "extend": read_update,
    "fork": read_fork,
    "truncate": read_update,
    "release": read_release,
    "renew": read_renew,
    "detach": read_detach,
    "lookup": read_fields(Lookup),
    "explain": read_explain,
    "reset": read_fields(Reset),
    "pin": read_fields(Pinned),
    "unpin": read_fields(Unpinned),
    "quota": read_quota,
    "snapshot": read_snapshot,
    "tree": read_outline,
}
"""How a client reads the answer of each verb."""
