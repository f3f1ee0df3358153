"""Long answers, serialised while they are written: all of their rows in one go would take long.

```
write   some rows ─ some rows ─ some rows ─ the rest
bytes   piece ───── piece ───── piece ───── piece           one after the other: the message
```
Pieces of a message one after the other are the message: their rows are joined.  What is inside of a
row is not, so each tree of an outline gets its length once all of its branches are there.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

from prefixcache.v1 import prefixcache_pb2 as pb

_LONG: Final = ("namespaces", "pins")
"""Rows of a snapshot of which there may be tens of thousands."""
_TREE: Final = bytes([pb.TreeResponse.NAMESPACES_FIELD_NUMBER << 3 | 2])
"""What stands before the length of a tree."""
_TREES_IN_ONE_GO: Final = 64


def in_pieces(steps: Generator[None, None, None], message: Any) -> Generator[None, None, Any]:
    """Write an answer, in steps.

    Args:
        steps: Write it into `message`, pausing now and then.
        message: Is empty.

    Returns:
        Its bytes, if it may be long; None: serialise `message`.
    """
    if isinstance(message, pb.SnapshotResponse):
        return (yield from _snapshot(steps, message))
    if isinstance(message, pb.TreeResponse):
        return (yield from _trees(steps, message))
    return (yield from steps)


def _snapshot(
    steps: Generator[None, None, None], message: pb.SnapshotResponse
) -> Generator[None, None, bytes]:
    pieces = []
    for _ in steps:
        for name in _LONG:
            if rows := getattr(message, name):
                piece = pb.SnapshotResponse()
                getattr(piece, name).extend(rows)
                del rows[:]
                pieces.append(piece.SerializeToString())
        yield
    return b"".join([*pieces, message.SerializeToString()])


def _trees(
    steps: Generator[None, None, None], message: pb.TreeResponse
) -> Generator[None, None, bytes]:
    bodies: list[list[bytes]] = []
    for _ in steps:
        _take_branches(message, bodies)
        yield
    _take_branches(message, bodies)
    pieces = []
    for number, (tree, parts) in enumerate(zip(message.namespaces, bodies, strict=True), 1):
        parts.append(tree.SerializeToString())
        pieces += [_TREE, _varint(sum(map(len, parts))), *parts]
        if number % _TREES_IN_ONE_GO == 0:
            yield
    del message.namespaces[:]
    return b"".join([message.SerializeToString(), *pieces])


def _take_branches(message: pb.TreeResponse, bodies: list[list[bytes]]) -> None:
    """Serialise the branches that were written since; only the last tree may have got more."""
    first = max(0, len(bodies) - 1)
    for number in range(first, len(message.namespaces)):
        tree = message.namespaces[number]
        if number == len(bodies):
            bodies.append([])
        piece = pb.NamespaceTree()
        piece.branches.extend(tree.branches)
        del tree.branches[:]
        bodies[number].append(piece.SerializeToString())


def _varint(number: int) -> bytes:
    """Write a length as the wire has it: seven bits a byte, the lowest first.

    >>> _varint(300).hex()
    'ac02'
    """
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    written.append(number)
    return bytes(written)
