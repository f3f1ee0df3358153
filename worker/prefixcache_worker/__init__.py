"""A model worker on the shared pool: loads any Hugging Face decoder, batches, reuses, streams.

`Model` runs the network on paged keys and values, `Engine` schedules requests over it, and
`prefixcache worker` is the process around both.  `LLM` is the same in a process of your own; torch
is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefixcache_worker.llm import LLM
    from prefixcache_worker.outputs import CompletionOutput, RequestOutput
    from prefixcache_worker.sampling_params import (
        BeamSearchParams,
        SamplingParams,
        StructuredOutputsParams,
    )

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]

_WHERE = {
    "LLM": "llm",
    "BeamSearchParams": "sampling_params",
    "CompletionOutput": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
    "StructuredOutputsParams": "sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
