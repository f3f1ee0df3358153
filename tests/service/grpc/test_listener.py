"""Addresses that cannot be served at: each is refused for its own reason, and nothing is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixcache.errors import InvalidRequest
from prefixcache.service.grpc.listener import Listener
from prefixcache.service.http.http_server import read_address


@pytest.mark.parametrize(
    "target",
    ["tcp://0.0.0.0:50051", "tcp:/0.0.0.0:50051", "http://localhost:1", "dns:///localhost:1"],
)
def test_a_scheme_that_is_not_known_is_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match="has the scheme"):
        Listener([target]).claim()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("8080", "the host is missing; write 127.0.0.1:8080"),
        ("localhost", "the host is missing; write 127.0.0.1:8080"),
        ("127.0.0.1:99999", "'99999' is no port"),
        ("127.0.0.1:-1", "'-1' is no port"),
        ("127.0.0.1:", "'' is no port"),
        ("127.0.0.1:" + "9" * 5000, "is no port"),
        ("0.0.0.0:8080", "on this machine only; write 127.0.0.1:8080"),
        ("[::]:8080", "on this machine only; write 127.0.0.1:8080"),
        ("example.org:80", "on this machine only; write 127.0.0.1:80"),
        ("unix:/run/page.sock", "neither sockets nor paths; write 127.0.0.1:PORT"),
        ("/run/page.sock", "neither sockets nor paths; write 127.0.0.1:PORT"),
    ],
)
def test_the_page_says_what_is_wrong_with_its_address(target: str, told: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_address(target)
    assert str(refused.value).startswith("--http")
    assert told in str(refused.value)
    assert "gRPC" not in str(refused.value)
    assert "pool" not in str(refused.value)


@pytest.mark.parametrize("target", ["127.0.0.1:0", "localhost:8080", "[::1]:65535"])
def test_the_page_is_shown_on_the_loopback_device(target: str) -> None:
    assert str(read_address(target)) == target
