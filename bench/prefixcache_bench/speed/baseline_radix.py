"""The baseline of the tree's benchmark: the smallest radix tree over packed bytes that will do.

It is what the core's tree is measured against, in the same process and the same minutes: whole
blocks only, one namespace, no tails, no ghosts, no ledger, no leases, and a match that stamps
what it visits. What the core does more costs something; the benchmark says how much.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from heapq import heappop, heappush
from typing import Any, NamedTuple

from sortedcontainers import SortedList

_LIST_UNTIL = 512


class Node:
    """A run of whole blocks."""

    __slots__ = ("blocks", "children", "key", "last", "order", "parent", "queued", "ref")

    def __init__(self, key: bytes, blocks: array[int], parent: Node | None) -> None:
        self.key = key
        self.blocks = blocks
        self.parent = parent
        self.children: dict[bytes, Node] | None = None
        self.order: Any = None  # the children's keys in order, from the second child on
        self.ref = 0
        self.last = 0
        self.queued = False


class Found(NamedTuple):
    """Where a descent ended."""

    node: Node
    used: int
    """Blocks of the node's run that matched."""
    end: int
    """Bytes that matched in whole blocks."""
    partial_block: int
    """The best partly matching block; -1 if there is none."""
    partial_tokens: int


def common_prefix(a: bytes, a_off: int, b: bytes, b_off: int, size: int) -> int:
    """Count equal leading bytes: doubling windows, halving, one XOR."""
    low, step = 0, 256
    while low < size:
        high = low + step
        if high > size:
            high = size
        if a[a_off + low : a_off + high] != b[b_off + low : b_off + high]:
            break
        low = high
        step <<= 1
    else:
        return size
    while high - low > 64:
        middle = (low + high) >> 1
        if a[a_off + low : a_off + middle] == b[b_off + low : b_off + middle]:
            low = middle
        else:
            high = middle
    differ = int.from_bytes(a[a_off + low : a_off + high], "big") ^ int.from_bytes(
        b[b_off + low : b_off + high], "big"
    )
    return high - ((differ.bit_length() + 7) >> 3)


class BaselineTree:
    """A path-compressed tree over packed tokens with LRU eviction of leaves.

    Args:
        block_size: Tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self.width = block_size * 4
        self.root = Node(b"", array("i"), None)
        self.root.ref = 1
        self.clock = 0
        self.evictable = 0
        self.protected = 0
        self._serial = 0
        self._heap: list[tuple[int, int, Node]] = []

    def match(self, key: bytes) -> Found:
        """Find the longest stored prefix.  Stamps the nodes on the path."""
        return self._match(key, self.root, 0)

    def _match(self, key: bytes, node: Node, off: int) -> Found:
        width = self.width
        size = len(key)
        self.clock = clock = self.clock + 1
        full = size - size % width
        while off < full:
            children = node.children
            child = children.get(key[off : off + width]) if children is not None else None
            if child is None:
                break
            child.last = clock
            run = child.key
            if key.startswith(run, off):
                off += len(run)
                node = child
                continue
            same = common_prefix(key, off, run, 0, min(len(run), size - off))
            used = same // width
            tokens = (same - used * width) >> 2
            return Found(
                child, used, off + used * width, child.blocks[used] if tokens else -1, tokens
            )
        block, most = -1, 0
        if off < size and node.children:
            rest = key[off : off + width]
            order = node.order
            if order is None:
                around = list(node.children)
            else:
                at = bisect_left(order, rest) if type(order) is list else order.bisect_left(rest)
                around = order[at - 1 : at + 1] if at else order[0:1]
            for other in around:
                same = common_prefix(rest, 0, other, 0, min(len(rest), len(other))) >> 2
                if same > most:
                    most = same
                    block = node.children[other].blocks[0]
        return Found(node, len(node.blocks), off, block, most)

    def lock(self, node: Node | None) -> None:
        """Protect a path."""
        while node is not None:
            ref = node.ref
            node.ref = ref + 1
            if ref:
                return
            size = len(node.blocks)
            self.evictable -= size
            self.protected += size
            node = node.parent

    def unlock(self, node: Node | None) -> None:
        """Take one lock back."""
        while node is not None:
            node.ref -= 1
            if node.ref:
                return
            size = len(node.blocks)
            self.evictable += size
            self.protected -= size
            if not node.children and not node.queued:
                self._push(node)
            node = node.parent

    def insert(self, key: bytes, blocks: array[int], at: Found) -> Node:
        """Store whole blocks that follow a match; `blocks` are those after `at.end`."""
        full = len(key) - len(key) % self.width
        node, used, off = at.node, at.used, at.end
        if node is self.root or used == len(node.blocks):
            node, used, off, _, _ = self._match(key[:full], node, off)
        if node is not self.root and 0 < used < len(node.blocks):
            node = self._split(node, used)
        if off >= full:
            return node
        child = Node(key[off:full], blocks[(off - at.end) // self.width :], node)
        child.last = self.clock
        self._add(node, key[off : off + self.width], child)
        self.evictable += len(child.blocks)
        self._push(child)
        return child

    def evict(self, count: int) -> array[int]:
        """Take `count` blocks from the tails of the coldest leaves."""
        heap = self._heap
        out = array("i")
        while count > 0 and heap:
            last, _, node = heappop(heap)
            node.queued = False
            if node.ref or node.children or node.parent is None:
                continue
            if node.last != last:
                self._push(node)
                continue
            size = len(node.blocks)
            if size > count:
                keep = size - count
                out.extend(node.blocks[keep:])
                node.blocks = node.blocks[:keep]
                node.key = node.key[: keep * self.width]
                self.evictable -= count
                self._push(node)
                break
            out.extend(node.blocks)
            count -= size
            self.evictable -= size
            self._remove(node)
        return out

    def _remove(self, node: Node) -> None:
        parent = node.parent
        if parent is None or parent.children is None:
            raise AssertionError("only a child can be removed")
        first = node.key[: self.width]
        del parent.children[first]
        order = parent.order
        if type(order) is list:
            del order[bisect_left(order, first)]
        elif order is not None:
            order.remove(first)
        node.parent = None
        if not parent.children and parent.ref == 0 and not parent.queued:
            self._push(parent)

    def _push(self, node: Node) -> None:
        self._serial += 1
        node.queued = True
        heappush(self._heap, (node.last, self._serial, node))

    def _add(self, parent: Node, first: bytes, node: Node) -> None:
        children = parent.children
        if children is None:
            parent.children = {first: node}
            return
        children[first] = node
        order = parent.order
        if order is None:
            if len(children) > 1:
                parent.order = sorted(children)
        elif type(order) is list:
            insort(order, first)
            if len(order) > _LIST_UNTIL:
                parent.order = SortedList(order)
        else:
            order.add(first)

    def _split(self, node: Node, used: int) -> Node:
        parent = node.parent
        if parent is None or parent.children is None:
            raise AssertionError("a root has no run to split")
        cut = used * self.width
        upper = Node(node.key[:cut], node.blocks[:used], parent)
        upper.last = node.last
        upper.ref = 1 if node.ref else 0
        parent.children[node.key[: self.width]] = upper
        node.key = node.key[cut:]
        node.blocks = node.blocks[used:]
        node.parent = upper
        upper.children = {node.key[: self.width]: node}
        return upper
