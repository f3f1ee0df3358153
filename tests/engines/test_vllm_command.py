"""What `prefixcache vllm` decides by itself, and what it leaves to its user."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import prefixcache
from prefixcache.errors import InvalidRequest, ServiceUnavailable, Unsupported
from prefixcache_vllm import command
from prefixcache_vllm.command import check_vllm

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


def test_flags_are_read_as_vllm_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    _, engine = shown(capsys, "in-place", "--block_size", "64", "--host=0.0.0.0")
    assert "--block-size" not in engine
    assert "127.0.0.1" not in engine
    for word in ("--kv-transfer-config.kv_role", "--scheduler_cls=mine"):
        with pytest.raises(InvalidRequest, match="for this command to decide"):
            shown(capsys, "in-place", word, "kv_both")
    with pytest.raises(InvalidRequest, match="as one JSON object"):
        shown(capsys, "in-place", "--additional-config.prefixcache.reserve", "8")


def test_a_port_at_which_somebody_listens_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words in (["--port", port], [f"--port={port}", "--host", "127.0.0.1"]):
            with pytest.raises(InvalidRequest, match=f"at port {port} already"):
                command.check_port(words)
        command.check_port(["--port", port, "--uds", "/s"])
        command.check_port(["--port", "0"])
        command.check_port(["--port", "what?"])
    with pytest.raises(InvalidRequest, match="1 to 65535"):
        command.check_port(["--port", "70000"])


def test_a_service_that_is_not_waited_for_any_more_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ctrl-C while it starts."""
    monkeypatch.setattr(command, "state", lambda: tmp_path)

    def interrupted(target: str) -> None:
        if (tmp_path / "prefixcache" / "vllm-serve.log").read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "reach", interrupted)
    target = f"unix:{tmp_path}/s"
    with pytest.raises(KeyboardInterrupt):
        command.start(command.serve_command(target, TOLD, "in-place", "1MiB"), target)
    with pytest.raises(ServiceUnavailable):
        prefixcache.connect(target, timeout_s=1)


def test_a_version_that_nobody_tested_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.33.1")
    with pytest.raises(Unsupported, match=r"vLLM 0\.33\.1 is installed; tested is 0\.32"):
        check_vllm()


def test_the_size_of_an_engines_own_cache_beside_a_connector_is_the_users(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, engine = shown(capsys, "connector", "--kv-cache-memory-bytes", "1000", "--port", "1")
    assert "--kv-cache-memory-bytes 1000" in engine
    assert "PrefixcacheConnector" in engine
    with pytest.raises(InvalidRequest, match="for this command to decide"):
        shown(capsys, "connector", "--kv-transfer-config", "{}")
