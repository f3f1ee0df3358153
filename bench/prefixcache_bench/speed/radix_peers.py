"""The trees that other projects ship, where they are installed: the same chats, found again.

They are called as their own schedulers call them, with what those have in hand: token ids as
`array('q')` for SGLang, lists for vLLM, whose look-up is one hash and one dict access per block.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from types import SimpleNamespace
from typing import Any, Protocol

from prefixcache.types import unpack
from prefixcache_bench.speed.radix_workload import Workload

BLOCK_SIZE = 16
NUM_BLOCKS = 200_000
EVICTED_TOKENS = 1_024


class Peer(Protocol):
    """Another project's tree."""

    def prepare(self, tokens: bytes) -> Any:
        """Turn packed tokens into what it takes; not measured."""

    def store(self, prepared: Any) -> None:
        """Keep a sequence."""

    def find(self, prepared: Any) -> Any:
        """Find a prefix; gives what `pin` takes."""

    def pin(self, found: Any) -> None:
        """Protect what was found, and let it go."""

    def evict(self, num_tokens: int) -> None:
        """Take the coldest out."""


class SglangTree:
    """SGLang's RadixCache in Python."""

    def __init__(self) -> None:
        tree = import_module("sglang.srt.mem_cache.radix_cache")
        base = import_module("sglang.srt.mem_cache.base_prefix_cache")
        self._torch = import_module("torch")
        self._key: Any = tree.RadixKey
        self._match: Any = base.MatchPrefixParams
        self._insert: Any = base.InsertParams
        self._evict: Any = base.EvictParams
        allocator = SimpleNamespace(
            device="cpu", free=lambda *_, **__: None, free_segment=lambda *_, **__: None
        )
        self._tree: Any = tree.RadixCache.create_simulated(
            mock_allocator=allocator, page_size=BLOCK_SIZE
        )

    def prepare(self, tokens: bytes) -> Any:
        """Make an array of 64-bit ids."""
        return array("q", unpack(tokens))

    def store(self, prepared: Any) -> None:
        """Insert; the values are slots."""
        slots = self._torch.arange(len(prepared), dtype=self._torch.int64)
        self._tree.insert(self._insert(key=self._key(prepared), value=slots))

    def find(self, prepared: Any) -> Any:
        """Match."""
        return self._tree.match_prefix(self._match(key=self._key(prepared))).last_device_node

    def pin(self, found: Any) -> None:
        """Count a reference up and down."""
        self._tree.inc_lock_ref(found)
        self._tree.dec_lock_ref(found)

    def evict(self, num_tokens: int) -> None:
        """Evict."""
        self._tree.evict(self._evict(num_tokens=num_tokens))


class VllmBlocks:
    """vLLM's BlockPool with its chained block hashes (sha256)."""

    def __init__(self) -> None:
        pool = import_module("vllm.v1.core.block_pool")
        utils = import_module("vllm.v1.core.kv_cache_utils")
        self._hash: Callable[..., Any] = utils.hash_block_tokens
        self._sha256: Any = import_module("vllm.utils.hashing").sha256
        utils.init_none_hash(self._sha256)
        self._pool: Any = pool.BlockPool(NUM_BLOCKS, True, BLOCK_SIZE)

    def prepare(self, tokens: bytes) -> Any:
        """Make a list of ids."""
        return unpack(tokens).tolist()

    def _hashes(self, prepared: Any) -> list[Any]:
        hashes: list[Any] = []
        last = None
        for end in range(BLOCK_SIZE, len(prepared) + 1, BLOCK_SIZE):
            last = self._hash(self._sha256, last, prepared[end - BLOCK_SIZE : end])
            hashes.append(last)
        return hashes

    def _cached(self, hashes: list[Any]) -> list[Any]:
        blocks = []
        for one in hashes:
            found = self._pool.get_cached_block(one, [0])
            if not found:
                break
            blocks.append(found[0])
        return blocks

    def store(self, prepared: Any) -> None:
        """Hash, look up, allocate, cache, free."""
        hashes = self._hashes(prepared)
        blocks = self._cached(hashes)
        known = len(blocks)
        self._pool.touch(blocks)
        blocks = blocks + self._pool.get_new_blocks(len(hashes) - known)
        request = SimpleNamespace(block_hashes=hashes)
        self._pool.cache_full_blocks(request, blocks, known, len(hashes), BLOCK_SIZE, 0)
        self._pool.free_blocks(reversed(blocks))

    def find(self, prepared: Any) -> Any:
        """Hash and look up, block by block."""
        return self._cached(self._hashes(prepared))

    def pin(self, found: Any) -> None:
        """Count references up and down, block by block."""
        self._pool.touch(found)
        self._pool.free_blocks(reversed(found))

    def evict(self, num_tokens: int) -> None:
        """Allocate, which evicts when the pool is full, and give back."""
        self._pool.free_blocks(self._pool.get_new_blocks(num_tokens // BLOCK_SIZE))


PEERS: tuple[tuple[str, str, Callable[[], Peer]], ...] = (
    ("SGLang", "sglang", SglangTree),
    ("vLLM", "vllm", VllmBlocks),
)


@dataclass(slots=True)
class Result:
    """What one peer showed: medians in microseconds by column, or why there are none."""

    name: str
    status: str
    figures_us: dict[str, float] = field(default_factory=dict)


def measure(workload: Workload, rounds: int = 3) -> list[Result]:
    """Run all peers, one after the other."""
    results = []
    for name, package, make in PEERS:
        if importlib.util.find_spec(package) is None:
            results.append(Result(name, "not installed"))
            continue
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "unknown version"
        try:
            figures = _measure_one(make(), workload, rounds)
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            results.append(Result(name, f"{version}, not measured: {error}"))
            continue
        results.append(Result(name, version, figures))
    return results


def _measure_one(peer: Peer, workload: Workload, rounds: int) -> dict[str, float]:
    for sequence in workload.sequences:
        peer.store(peer.prepare(sequence))
    times: dict[str, list[float]] = {}
    clock = time.perf_counter_ns

    def timed(column: str, call: Callable[[Any], Any], given: Sequence[Any]) -> list[Any]:
        started = clock()
        answers = [call(one) for one in given]
        times.setdefault(column, []).append((clock() - started) / 1e3 / len(given))
        return answers

    for number in range(rounds):
        for length, probes in workload.probes.items():
            short = f"{length // 1000}k"
            found = timed(f"hit {short}", peer.find, [peer.prepare(one.hit) for one in probes])
            timed(f"lock {short}", peer.pin, found)
            timed(f"miss {short}", peer.find, [peer.prepare(one.miss) for one in probes])
            more = number.to_bytes(4, "little") * 256
            timed(f"insert {short}", peer.store, [peer.prepare(one.hit + more) for one in probes])
        timed("evict 1,024", peer.evict, [EVICTED_TOKENS] * 16)
    return {column: statistics.median(series) for column, series in times.items()}


def table(results: Sequence[Result]) -> Iterator[str]:
    """Draw the peers as lines of text."""
    for result in results:
        yield f"peer {result.name}: {result.status}"
        if result.figures_us:
            yield "  " + "  ".join(f"{name} {us:,.1f}" for name, us in result.figures_us.items())
