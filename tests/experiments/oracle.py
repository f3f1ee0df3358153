"""A brute-force prefix cache: one object per block, every leaf looked at for every eviction."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefixcache.types import unpack
from prefixcache_bench.experiments.traces import Trace


@dataclass(eq=False)
class Block:
    """A cached block, below the block that precedes it."""

    parent: Block | None = None
    key: tuple[int, ...] = ()
    children: dict[tuple[int, ...], Block] = field(default_factory=dict)
    used: int = 0


@dataclass
class Expected:
    """The sums of the metric definitions."""

    hit_tokens: int = 0
    partial_tokens: int = 0
    hit_blocks: int = 0
    prompt_blocks: int = 0
    request_hits: float = 0.0
    evictions: int = 0
    peak_blocks: int = 0


def expected(trace: Trace, block_size: int, capacity_blocks: int | None) -> Expected:
    """Replay a token trace: whole blocks, LRU over leaves, one request after the other."""
    found = Expected()
    roots: dict[object, Block] = {}
    blocks: list[Block] = []
    clock = 0
    for request in trace:
        root = roots.setdefault(request.namespace, Block())
        tokens = list(unpack(request.tokens))
        prompt, limit = tokens[: request.prompt], request.prompt - 1
        node, matched = root, 0
        while matched + block_size <= limit:
            child = node.children.get(tuple(prompt[matched : matched + block_size]))
            if child is None:
                break
            node, matched = child, matched + block_size
        rest = prompt[matched:limit]
        found.hit_tokens += matched
        found.partial_tokens += max((_common(rest, key) for key in node.children), default=0)
        found.hit_blocks += matched // block_size
        found.prompt_blocks += -(-request.prompt // block_size)
        found.request_hits += matched / request.prompt

        whole = len(tokens) // block_size
        if capacity_blocks is not None:
            whole = min(whole, capacity_blocks)
        path: list[Block] = []
        node = root
        for index in range(whole):
            key = tuple(tokens[index * block_size : (index + 1) * block_size])
            if key not in node.children:
                if capacity_blocks is not None and len(blocks) == capacity_blocks:
                    # What is on the path stays: it is in use.
                    leaves = [one for one in blocks if not one.children and one not in path]
                    victim = min(leaves, key=lambda one: one.used)
                    assert victim.parent is not None
                    del victim.parent.children[victim.key]
                    blocks.remove(victim)
                    found.evictions += 1
                node.children[key] = Block(node, key)
                blocks.append(node.children[key])
            node = node.children[key]
            path.append(node)
        for block in reversed(path):
            clock += 1
            block.used = clock
        found.peak_blocks = max(found.peak_blocks, len(blocks))
    return found


def _common(a: list[int], b: tuple[int, ...]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
