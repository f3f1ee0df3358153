"""The development set: the recorded workloads on which the eviction policies are compared.

A workload is a trace at one block size, with the capacities at which memory is scarce.  The folder
holds the block-hash traces `mooncake_conversation.jsonl.gz` and `weka-agentic.jsonl.gz`, and the
kvtrace workloads `sharegpt`, `tau-airline` and `gsm8k-8shot`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefixcache_bench.experiments.readers.load import System, load
from prefixcache_bench.experiments.traces import Trace


@dataclass(frozen=True)
class Workload:
    """A trace, a block size, and capacities in blocks."""

    name: str
    about: str
    block_size: int
    capacities: tuple[int, ...]
    kvtrace: str = ""
    """The workload's name in the folder of kvtrace files; or else ..."""
    file: str = ""
    """... the trace's file in the folder."""
    system: System = System.NONE
    every_policy: bool = False
    """Whether all policies are compared here; on the others, only LRU and the one that learns."""

    timed_at: tuple[int, ...] = ()
    """Capacities at which processor time is measured too."""

    ablated_at: tuple[int, ...] = ()
    """Capacities at which the policy that learns is also replayed without each of its ideas."""

    @property
    def title(self) -> str:
        """Give the name with the block size."""
        return f"{self.name}, blocks of {self.block_size}"

    def load(self, folder: Path) -> Trace:
        """Read the trace.

        Raises:
            InvalidRequest: the folder does not have it.
        """
        if self.file:
            return load(str(folder / self.file))
        return load(str(folder), name=self.kvtrace, system=self.system)


def _blocks(size: int, *tokens: int) -> tuple[int, ...]:
    return tuple(amount // size for amount in tokens)


_SHAREGPT = "16,019 requests of real multi-turn chat; think times are synthetic"
_TAU = "1,229 requests of agents that call tools, one long policy before each"

DEVELOPMENT_SET = (
    Workload(
        "Mooncake conversation",
        "12,031 requests to a chat service, one hour, real times; share of blocks",
        512,
        (1000, 2000, 5000, 10_000, 20_000, 30_000, 50_000, 100_000),
        file="mooncake_conversation.jsonl.gz",
        every_policy=True,
        timed_at=(1000, 5000, 20_000),
        ablated_at=(2000, 5000, 10_000, 20_000, 50_000),
    ),
    Workload(
        "Agentic coding",
        "964 requests of 20 sessions, real times; 2,052 blocks each",
        64,
        (7812, 15_625, 31_250, 50_000),
        file="weka-agentic.jsonl.gz",
        every_policy=True,
        timed_at=(7812, 31_250),
        ablated_at=(7812, 15_625),
    ),
    *(
        Workload(
            "tau-airline",
            _TAU,
            size,
            _blocks(size, 16_384, 32_768, 65_536),
            kvtrace="tau-airline",
            every_policy=size == 16,
        )
        for size in (16, 64, 256)
    ),
    Workload(
        "GSM8K, 8 shots",
        "660 one-turn questions after the same eight examples",
        16,
        (1024, 2048, 4096),
        kvtrace="gsm8k-8shot",
        every_policy=True,
        timed_at=(1024,),
    ),
    *(
        Workload(
            "ShareGPT" + suffix,
            _SHAREGPT,
            size,
            _blocks(size, 32_768, 65_536, 131_072, 262_144, 524_288),
            kvtrace="sharegpt",
            system=system,
            every_policy=(size, system) in {(16, System.NONE), (64, System.FOUR)},
            timed_at=(2048, 16_384) if (size, system) == (16, System.NONE) else (),
        )
        for size in (16, 64, 256)
        for suffix, system in (
            ("", System.NONE),
            (", one system prompt", System.ONE),
            (", four system prompts", System.FOUR),
        )
    ),
)
