"""Real clients, each in its own version and environment, against a real `prefixcache up`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.zoo import LIGHT, SCRIPTS, lacks, try_client
from prefixcache_bench.speed.endpoint import Endpoint, endpoint
from prefixcache_worker import smollm2

GIVEN = os.environ.get("PREFIXCACHE_CLIENTS", "")
FOLDER = Path(GIVEN) if GIVEN else None


@pytest.fixture(scope="module")
def serving() -> Iterator[Endpoint]:
    with endpoint("--memory", "512MiB") as found:
        yield found


@pytest.mark.parametrize("name", LIGHT)
def test_a_client_finds_what_its_users_do(request: pytest.FixtureRequest, name: str) -> None:
    """Chat, stream, structured answers, tools, errors, and what it does when its user leaves."""
    if why := lacks(name, FOLDER):
        pytest.skip(f"$PREFIXCACHE_CLIENTS: {why}")
    assert FOLDER is not None
    serving: Endpoint = request.getfixturevalue("serving")
    files = smollm2.folder()
    tried = try_client(name, FOLDER, serving.url, smollm2.NAME, files)
    assert not tried.failed, tried
    assert not tried.refused, tried  # nothing that these clients send is without effect here
    assert tried.done


def test_each_script_is_tried() -> None:
    from clients.zoo import HEAVY

    found = {path.stem.removeprefix("with_") for path in SCRIPTS.glob("with_*")}
    assert found == {*LIGHT, *HEAVY}
