from __future__ import annotations

import pytest
import torch

from kernels.conftest import poisoned_memory
from prefixcache_worker.model import Model
from worker.zoo import build

__all__ = ["poisoned_memory"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Model:
    """A tiny random Llama on the lean network."""
    return Model.of(build("llama"), name="tiny")
