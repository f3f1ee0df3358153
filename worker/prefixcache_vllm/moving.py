"""What scheduler and worker say to each other when an engine in place changes to another pool.

```
scheduler   Move(pool, group) ──► worker    beside a step without tokens
            Moved(why)        ◄──           beside its output; empty: it has moved
```
Both travel where a connector's words do: in place there is none.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.v1.outputs import KVConnectorOutput

from prefixcache.types import PoolHandle


@dataclass
class Move(KVConnectorMetadata):
    """Where to compute from now on.

    Attributes:
        pool: whose memory.
        group: of the engine's processes that write there.
    """

    pool: PoolHandle
    group: str


@dataclass
class Moved(KVConnectorWorkerMetadata):
    """Why the worker has not moved; empty: it has."""

    why: str

    def aggregate(self, other: Moved) -> Moved:
        """Give what all ranks say."""
        return Moved(self.why or other.why)


def asked_of(scheduler_output: Any) -> Move | None:
    """Take the word to move out of a step, if there is one."""
    said = scheduler_output.kv_connector_metadata
    if not isinstance(said, Move):
        return None
    scheduler_output.kv_connector_metadata = None
    return said


def with_answer(output: Any, why: str) -> Any:
    """Give a step's output with what became of the move."""
    told = copy(output)  # the empty one is vLLM's for all
    told.kv_connector_output = KVConnectorOutput(kv_connector_worker_meta=Moved(why))
    return told


def answer_of(output: Any) -> str | None:
    """Take the worker's answer out of a step's output; None if there is none."""
    told = output.kv_connector_output
    said = None if told is None else told.kv_connector_worker_meta
    if not isinstance(said, Moved):
        return None
    output.kv_connector_output = None
    return said.why
