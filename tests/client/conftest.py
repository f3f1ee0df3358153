from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from client.backends import BACKENDS, Backend


@pytest.fixture(scope="session")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


@pytest.fixture(scope="module", params=list(BACKENDS))
def shared_backend(request: pytest.FixtureRequest, sockets: Path) -> Iterator[Backend]:
    name = request.param.replace(" ", "-")
    backend = BACKENDS[request.param](f"unix:{sockets}/{name}.sock")
    yield backend
    backend.close()


@pytest.fixture
def cache(shared_backend: Backend) -> Iterator[Backend]:
    """One cache of 64 blocks of 4 tokens, empty, with a ttl of 1 s."""
    yield shared_backend
    shared_backend.clean()
    left = shared_backend.snapshot()
    assert left.free + left.evictable == left.num_blocks, left
    assert not left.leases
