"""Real conversations, replayed: every printed digit of the reference simulators.

The traces are large and optional.  PREFIXCACHE_TRACES names a folder in the `kvtrace-v1` form:
for each workload `NAME.convs.jsonl.gz` (tokens of whole conversations) and
`NAME.requests.jsonl.gz` (in order of service: conversation, prompt length, cached length), and
`reference_tokens.csv` with the expected figures.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
from functools import cache
from pathlib import Path

import pytest

from core.replay import SCRATCH, Replay
from core.stack import Stack
from prefixcache.types import TOKEN_BYTES, Namespace, Partial, pack

FOLDER = os.environ.get("PREFIXCACHE_TRACES", "")
NAMESPACE = Namespace("reference")

if not FOLDER:
    pytest.skip(
        "set PREFIXCACHE_TRACES to a folder with *.convs.jsonl.gz, *.requests.jsonl.gz and "
        "reference_tokens.csv to replay real conversations",
        allow_module_level=True,
    )

BOUNDED = [
    *(("gsm8k-8shot", size, cap) for size in (4, 16, 64, 256) for cap in (16384, 32768, 65536)),
    *(("tau-airline", size, cap) for size in (16, 64, 512) for cap in (16384, 32768, 131072)),
]
UNBOUNDED = [
    *(("gsm8k-8shot", size) for size in (1, 16, 64, 512)),
    *(("tau-airline", size) for size in (16, 256)),
]


@cache
def requests(workload: str) -> list[tuple[bytes, bytes]]:
    """Load (prompt, what exists after it) of one workload, in order of service."""
    folder = Path(FOLDER)
    conversations = [pack(one["tokens"]) for one in _lines(folder / f"{workload}.convs.jsonl.gz")]
    return [
        (
            conversations[one["conv"]][: one["prompt_len"] * TOKEN_BYTES],
            conversations[one["conv"]][: one["cached_len"] * TOKEN_BYTES],
        )
        for one in _lines(folder / f"{workload}.requests.jsonl.gz")
    ]


def _lines(path: Path) -> list[dict[str, list[int]]]:
    with gzip.open(path, "rt") as file:
        next(file)  # the header
        return [json.loads(line) for line in file]


@cache
def expected(workload: str, block_size: int, capacity_tokens: int) -> dict[str, str]:
    """Give the reference's row."""
    with (Path(FOLDER) / "reference_tokens.csv").open() as file:
        for row in csv.DictReader(file):
            if (row["workload"], row["block"], row["cap_tokens"]) == (
                workload,
                str(block_size),
                str(capacity_tokens),
            ):
                return row
    raise AssertionError(f"reference_tokens.csv has no row {workload}, {block_size}")


@pytest.mark.parametrize(("workload", "block_size", "capacity_tokens"), BOUNDED)
def test_bounded_replay_equals_the_reference(
    workload: str, block_size: int, capacity_tokens: int
) -> None:
    row = expected(workload, block_size, capacity_tokens)
    replay = Replay(capacity_tokens // block_size, block_size)
    prompt_tokens = hit_tokens = peak_blocks = 0
    for prompt, cached in requests(workload):
        hit, partial = replay.request(NAMESPACE, prompt, cached)
        assert partial == 0
        prompt_tokens += len(prompt) // TOKEN_BYTES
        hit_tokens += hit
    snapshot = replay.cache.snapshot(now=0.0)
    peak_blocks = snapshot.indexed
    assert prompt_tokens == int(row["prompt_tokens"])
    assert hit_tokens == int(row["hit_tokens"])
    assert f"{round(hit_tokens / prompt_tokens, 6)}" == row["hit_rate"]
    assert snapshot.evicted == int(row["evictions"])
    assert peak_blocks == int(row["peak_blocks"])


@pytest.mark.parametrize(("workload", "block_size"), UNBOUNDED)
@pytest.mark.parametrize("partial", Partial)
def test_unbounded_replay_equals_the_reference(
    workload: str, block_size: int, partial: Partial
) -> None:
    row = expected(workload, block_size, 0)
    everything = sum(
        len(cached) // TOKEN_BYTES // block_size + 2 for _, cached in requests(workload)
    )
    replay = Replay(everything, block_size, partial=partial)
    hit_tokens = partial_tokens = 0
    for prompt, cached in requests(workload):
        hit, part = replay.request(NAMESPACE, prompt, cached)
        hit_tokens += hit
        partial_tokens += part
    if partial is not Partial.TAILS:
        assert hit_tokens == int(row["hit_tokens"])
    match partial:
        case Partial.OFF:
            assert partial_tokens == 0
        case Partial.BLOCKS:
            assert hit_tokens + partial_tokens == int(row["hit_tokens_partial"])
        case Partial.TAILS:  # reuse is token-exact: as good as blocks of one token
            exact = expected(workload, 1, 0)
            assert hit_tokens + partial_tokens == int(exact["hit_tokens"])


STACKS = [
    ("gsm8k-8shot", 16, 512, 1536, 0),
    ("gsm8k-8shot", 64, 256, 256, 128),
    ("tau-airline", 16, 1024, 3072, 0),
    ("tau-airline", 16, 1024, 0, 3072),
    ("tau-airline", 16, 1024, 1024, 2048),
    ("tau-airline", 64, 512, 128, 128),
]
"""Workload, tokens of a block, blocks of the pool, of the tier in memory below it, and on disk."""


def compare_stack(
    pool: int, host: int, disk: int, block_size: int, asked: list[tuple[bytes, bytes]]
) -> tuple[int, int]:
    """Replay beside one pool of the summed size; give the tokens found in the pool, and below."""
    width = block_size * TOKEN_BYTES
    longest = min(pool, max(len(cached) // width for _, cached in asked))
    stack = Stack(pool, host, longest, block_size, disk_blocks=disk)
    flat = Replay(pool + host + disk, block_size)
    for prompt, cached in asked:
        kept = cached[: min(longest, len(cached) // width) * width]
        found, _ = flat.request(NAMESPACE, prompt, kept)
        assert stack.request(NAMESPACE, prompt, kept) == found
    stack.cache.check()
    return stack.hits[0], stack.hits[1]


@pytest.mark.parametrize(("workload", "block_size", "pool", "host", "disk"), STACKS)
def test_a_pool_and_its_tiers_find_what_one_pool_of_their_size_does(
    workload: str, block_size: int, pool: int, host: int, disk: int
) -> None:
    here, below = compare_stack(pool, host, disk, block_size, requests(workload))
    assert here
    assert below or workload == "gsm8k-8shot", "nothing ever came back"  # one turn each


@pytest.mark.parametrize(
    ("pool", "host", "disk"),
    [
        (1000, 9000, 0),
        (10_000, 20_000, 0),
        (10_000, 40_000, 0),
        (10_000, 20_000, 20_000),
        (1000, 9000, 40_000),
        (10_000, 0, 20_000),
    ],
)
def test_a_pool_and_its_tiers_find_what_one_pool_does_of_a_service_for_many(
    pool: int, host: int, disk: int
) -> None:
    """Each block of 512 tokens is a word that names its whole prefix."""
    with gzip.open(Path(FOLDER) / "mooncake_conversation.jsonl.gz", "rt") as file:
        asked = [pack(json.loads(line)["hash_ids"]) for line in file]
    here, below = compare_stack(pool, host, disk, 1, [(one + SCRATCH, one) for one in asked])
    total = sum(len(one) for one in asked) // TOKEN_BYTES
    expected = {10_000: ".2116", 30_000: ".3257", 50_000: ".3546"}[pool + host + disk]
    assert f"{(here + below) / total:.4f}".removeprefix("0") == expected
