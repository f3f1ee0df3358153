"""Outlines of trees, to messages and back; beside `codec`, which has the everyday words."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

from prefixcache.client.codec import read_namespace, show_namespace
from prefixcache.outline import Branch, Extent, NamespaceOutline, Order, Outline
from prefixcache.v1 import prefixcache_pb2 as pb

ORDERS: Final = {
    Order.TOKENS: pb.TREE_ORDER_TOKENS,
    Order.HEAT: pb.TREE_ORDER_HEAT,
}
_PAUSE_EVERY: Final = 128
_ORDERS: Final[dict[int, Order]] = {int(number): order for order, number in ORDERS.items()}


def read_order(number: Any) -> Order:
    """Read an order; by tokens, if none that is known here is named."""
    return _ORDERS.get(int(number), Order.TOKENS)


def write_outline(answer: Outline, message: pb.TreeResponse) -> Generator[None, None, None]:
    """Fill `message`, pausing after some hundred branches.  O(branches)."""
    steps = 0
    message.block_size = answer.block_size
    message.num_moved = answer.num_moved
    for outline in answer.namespaces:
        tree = message.namespaces.add()
        show_namespace(outline.namespace, tree.namespace)
        for branch in outline.branches:
            _write_branch(branch, tree.branches.add())
            steps += 1
            if steps % _PAUSE_EVERY == 0:
                yield


def read_outline(message: pb.TreeResponse) -> Outline:
    """Read what `write_outline` wrote."""
    return Outline(
        message.block_size,
        tuple(
            NamespaceOutline(
                read_namespace(tree.namespace), tuple(map(_read_branch, tree.branches))
            )
            for tree in message.namespaces
        ),
        message.num_moved,
    )


def _write_branch(word: Branch, message: pb.Branch) -> None:
    for name in _NUMBERS:
        setattr(message, name, getattr(word, name))
    for name in _OPTIONAL:
        if (value := getattr(word, name)) is not None:
            setattr(message, name, value)
    _write_extent(word.below, message.below)
    _write_extent(word.more, message.more)


def _read_branch(message: pb.Branch) -> Branch:
    return Branch(
        below=_read_extent(message.below),
        more=_read_extent(message.more),
        **{name: getattr(message, name) for name in _NUMBERS},
        **{
            name: getattr(message, name) if message.HasField(name) else None  # type: ignore[arg-type]
            for name in _OPTIONAL
        },
    )


def _write_extent(word: Extent, message: pb.Extent) -> None:
    message.runs = word.runs
    message.blocks = word.blocks
    message.tokens = word.tokens
    message.ghost_tokens = word.ghost_tokens


def _read_extent(message: pb.Extent) -> Extent:
    return Extent(message.runs, message.blocks, message.tokens, message.ghost_tokens)


_NUMBERS: Final = (
    "depth",
    "start",
    "num_tokens",
    "num_blocks",
    "tokens",
    "num_more",
    "num_locks",
    "is_ghost",
    "is_pinned",
    "heat",
    "num_parted",
)
_OPTIONAL: Final = ("idle_s", "num_uses", "parted_at")
