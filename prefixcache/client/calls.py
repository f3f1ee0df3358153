"""Questions that need no session: each is described here once, as a value.

```
calls.lookup(namespace, tokens) ──► Call(verb, request, read)
Client.lookup   sends it, and reads the answer
AsyncClient.lookup   the same, awaited
```
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from prefixcache.client import codec, unary
from prefixcache.outline import Order, Outline
from prefixcache.types import (
    Checked,
    Explanation,
    Lookup,
    Namespace,
    Pinned,
    QuotaInfo,
    Reset,
    Snapshot,
    TokensLike,
    Unpinned,
    pack,
)
from prefixcache.v1 import prefixcache_pb2 as pb

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One unary call: what is sent, and what becomes of the answer."""

    verb: str
    request: Any
    read: Callable[[Any], T]


def described_by(described: Callable[..., Any], method: F, *, skip: int = 0) -> F:
    """Give a method the name, the arguments and the description of the function that it wraps.

    Args:
        described: that function.
        method: a method whose arguments after `self` are those of `described`.
        skip: how many arguments of `described` come before these.
    """
    signature = inspect.signature(described)
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__name__, method.__doc__ = described.__name__, described.__doc__
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[me, *list(signature.parameters.values())[skip:]],
        return_annotation=inspect.Signature.empty,
    )
    return method


def _call(verb: str, **fields: Any) -> Call[Any]:
    """Describe a call by the fields of its request.

    Raises:
        InvalidRequest: no message can hold one of them; it is named.
    """
    request = unary.RPCS[verb].request()
    codec.put(request, **fields)
    return Call(verb, request, codec.READ[verb])


def _about(namespace: Namespace, verb: str, **fields: Any) -> Call[Any]:
    """Describe a call about a namespace; see `_call`."""
    call = _call(verb, **fields)
    with codec.no_foreign_errors(verb):
        codec.write_namespace(namespace, call.request.namespace)
    return call


def lookup(namespace: Namespace, tokens: TokensLike) -> Call[Lookup]:
    """Ask what `acquire` would find there.  Takes nothing; needs no session."""
    return _about(namespace, "lookup", tokens=pack(tokens))


def explain(namespace: Namespace, tokens: TokensLike) -> Call[Explanation]:
    """Ask why each token would or would not be reused there.  Needs no session."""
    return _about(namespace, "explain", tokens=pack(tokens))


def recount(request: str, namespace: Namespace | None = None) -> Call[Explanation]:
    """Ask why a request that was granted lately was answered as it was.

    Args:
        request: its request id (or that without its last `/part`), or `worker#lease`.
        namespace: where it was; by default, anywhere without a salt.

    Raises:
        NotFound: the service remembers no such request.
    """
    if namespace is None:
        return _call("explain", request_id=request)
    return _about(namespace, "explain", request_id=request)


def check(max_runs: int = 0) -> Call[Checked]:
    """Have the service check every invariant, in steps: others are served meanwhile.

    Args:
        max_runs: Up to so many runs and leases are checked in one go, while everybody waits, about
            30 microseconds for each. Then nothing is left out. 0: 500.
    """
    return _call("check", max_runs=max_runs)


def reset(namespace: Namespace) -> Call[Reset]:
    """Make a namespace forget what it has stored.  Needs no session."""
    return _about(namespace, "reset")


def reset_unnamed() -> Call[Reset]:
    """Make the service forget what lies on disk or elsewhere, of all that the caller may name.

    Also of those that nobody has named since the service was started, and that no list has.  What
    is stored in its memory, by names that are listed, stays: `reset` them first.

    Raises:
        PermissionDenied: the caller may not name every model of his tenant.
    """
    return _call("reset", unnamed=True)


def pin(namespace: Namespace, tokens: TokensLike, *, ttl_s: float) -> Call[Pinned]:
    """Let what is stored of a prefix be evicted last for `ttl_s`.  Needs no session."""
    codec.check_seconds("ttl_s", ttl_s)
    return _about(namespace, "pin", tokens=pack(tokens), ttl_s=ttl_s)


def unpin(namespace: Namespace, tokens: TokensLike = b"") -> Call[Unpinned]:
    """End the pin of exactly this prefix, or all pins of a namespace.  Needs no session."""
    return _about(namespace, "unpin", tokens=pack(tokens))


def quota(scope: Namespace | str) -> Call[QuotaInfo]:
    """Ask what a namespace, or a tenant by name, may hold, and holds.  Needs no session."""
    if isinstance(scope, str):
        return _call("quota", tenant=scope)
    call = _about(scope, "quota")
    call.request.namespace.SetInParent()
    return call


def set_quota(
    scope: Namespace | str, *, max_held: int | None, guaranteed: int = 0
) -> Call[QuotaInfo]:
    """Say what a namespace, or a tenant by name, may hold.  Needs no session.

    Args:
        scope: whose quota.
        max_held: most blocks that its leases may hold; None is no limit.
        guaranteed: stored blocks up to which nothing of it is evicted while others have
            evictable ones.
    """
    call = quota(scope)
    codec.put(call.request, set=True, guaranteed=guaranteed)
    if max_held is not None:
        codec.put(call.request, max_held=max_held)
    return call


def snapshot() -> Call[Snapshot]:
    """Ask for the state of the whole cache.  Needs no session."""
    return _call("snapshot")


@codec.no_foreign_errors("outline")
def outline(
    namespace: Namespace | None = None,
    *,
    order: Order = Order.TOKENS,
    max_branches: int = 1000,
    max_depth: int | None = None,
    ghosts: bool = True,
) -> Call[Outline]:
    """Ask for the largest or hottest branches of the trees, the rest summed up.

    Args:
        namespace: which tree; all, if None.
        order: which branches are kept, and which comes first.
        max_branches: how many are kept in all.
        max_depth: runs below the root beyond which all is summed up.
        ghosts: whether evicted runs are shown.
    """
    codec.check_flag("ghosts", ghosts)
    call = _call(
        "tree",
        order=codec.ORDERS[order],
        without_ghosts=not ghosts,
        max_branches=max_branches,
        max_depth=0 if max_depth is None else max_depth,
    )
    if namespace is not None:
        codec.write_namespace(namespace, call.request.namespace)
    return call


@codec.no_foreign_errors("watch")
def watch(
    from_sequence: int = 0, *, namespace: Namespace | None = None, tokens: bool = False
) -> pb.WatchRequest:
    """Give what enters and leaves the index, as hashes of whole blocks.  Needs no session.

    Never ends by itself.  After a lost connection go on from the last `next_sequence`.

    Args:
        from_sequence: 0: what is stored now, and then what changes; else what changes from
            this event on.
        namespace: only what concerns it.
        tokens: also token ids, where the service allows it.

    Raises:
        InvalidRequest: the service sends no token ids.
        ServiceUnavailable: the connection is lost.
    """
    request = pb.WatchRequest(tokens=tokens)
    codec.put(request, from_sequence=from_sequence)
    if namespace is not None:
        codec.write_namespace(namespace, request.namespace)
    return request
