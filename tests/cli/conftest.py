from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import prefixcache
from cli.running import At
from prefixcache.client import Client
from wire.service_process import running, sizes


@pytest.fixture(scope="session")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("c")


@pytest.fixture(scope="session")
def service(sockets: Path) -> Iterator[At]:
    """A service of 64 blocks of 4 tokens, in another process."""
    with running(f"unix:{sockets}/cli.sock", *sizes(64, 4)) as service:
        yield At(service.target)


@pytest.fixture
def at(service: At) -> At:
    """The same, with nothing stored."""
    with prefixcache.connect(service.target) as client:
        forget(client)
    return service


def forget(client: Client) -> None:
    for namespace in client.snapshot().namespaces:
        client.reset(namespace)
