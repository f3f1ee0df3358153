from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import prefixcache
from prefixcache.client import Client
from prefixcache_worker import smollm2
from prefixcache_worker.model import Model
from worker.zoo import Service, build

# The processes that the tests start find the packages where this one does.
os.environ["PYTHONPATH"] = os.pathsep.join(
    str(Path(__file__).parents[2] / root) for root in (".", "kernels", "worker", "tests")
)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Model:
    """A tiny random Llama on the lean network."""
    return Model.of(build("llama"), name="tiny")


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return smollm2.folder(quiet=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: a socket's name has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="pfx") as path:
        yield Path(path)


@pytest.fixture
def service(folder: Path) -> Iterator[Service]:
    service = Service(folder)
    service.start()
    yield service
    service.stop()


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with prefixcache.connect(service.target) as client:
        yield client
