"""What `prefixcache vllm` decides by itself, and what it leaves to its user."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prefixcache.errors import InvalidRequest
from prefixcache_vllm import command

TOLD = {
    "layout": "pages:2x32768:vllm/cpu/float32",
    "model": "m",
    "block_size": 32,
    "async_scheduling": False,
    "on_cpu": True,
}


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "check_vllm", lambda: None)
    monkeypatch.setattr(command, "reach", lambda target: None)
    monkeypatch.setattr(command, "ask_vllm", lambda *asked: TOLD)


def shown(capsys: pytest.CaptureFixture[str], mode: str, *words: str) -> tuple[str, str]:
    """The two command lines that are printed."""
    context: Any = SimpleNamespace(args=list(words))
    command.vllm(context, "m", mode=mode, connect="unix:/s", show=True)
    service, engine = capsys.readouterr().out.splitlines()
    return service, engine


def test_an_engine_in_place_has_no_cache_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    service, engine = shown(capsys, "in-place", "--port", "8001")
    assert service.startswith("prefixcache serve --listen unix:/s --memory 4GiB --block-size 32")
    assert "--first-block 1" in service
    assert "--port 8001 --host 127.0.0.1" in engine
    assert "--no-enable-prefix-caching" in engine
    for flag in ("--kv-cache-memory-bytes=1", "--kv_cache_memory_bytes", "--enable-prefix-caching"):
        with pytest.raises(InvalidRequest, match="for this command to decide"):
            shown(capsys, "in-place", flag)


def test_the_size_of_an_engines_own_cache_beside_a_connector_is_the_users(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, engine = shown(capsys, "connector", "--kv-cache-memory-bytes", "1000", "--port", "1")
    assert "--kv-cache-memory-bytes 1000" in engine
    assert "PrefixcacheConnector" in engine
    with pytest.raises(InvalidRequest, match="for this command to decide"):
        shown(capsys, "connector", "--kv-transfer-config", "{}")
