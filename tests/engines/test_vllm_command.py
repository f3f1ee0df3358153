"""What `prefixcache vllm` decides by itself, and what it leaves to its user."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import prefixcache
from prefixcache.errors import InvalidRequest, LayoutMismatch, ServiceUnavailable, Unsupported
from prefixcache_vllm import command
from prefixcache_vllm.command import check_vllm
from service.service_process import environment

TOLD: dict[str, Any] = {
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
        if any(path.read_text() for path in tmp_path.glob("prefixcache/vllm-serve-*.log")):
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "reach", interrupted)
    target = f"unix:{tmp_path}/s"
    with pytest.raises(KeyboardInterrupt):
        command.start(command.serve_command(target, TOLD, "in-place", "1MiB"), target)
    with pytest.raises(ServiceUnavailable):
        prefixcache.connect(target, timeout_s=1)


STARTING = (
    "import sys; from prefixcache_vllm import command as c; c.start(sys.argv[2:], sys.argv[1])"
)


def test_of_two_who_would_start_a_service_at_once_one_does_and_both_find_it(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/s"
    serve = command.serve_command(target, TOLD, "in-place", "1MiB")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", STARTING, target, *serve],
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | {"XDG_STATE_HOME": str(tmp_path)},
        )
        for _ in range(2)
    ]
    said = "".join(one.communicate()[1] for one in both)
    pids = [int(pid) for pid in re.findall(r"the service is process (\d+)", said)]
    try:
        assert [one.returncode for one in both] == [0, 0], said
        assert len(pids) == said.count("starting a service") == 1
        command.try_attaching(target, "in-place", TOLD)
        command.try_attaching(target, "in-place", TOLD | {"model": "of the same shape"})
        for other, reason in (
            ({"block_size": 64}, "has blocks of 32 tokens, and this engine has blocks of 64"),
            ({"layout": TOLD["layout"].replace("2x", "4x")}, "you sent pages:4x32768"),
            ({"layout": "pages:2x16384:vllm/cpu/bfloat16"}, "neither could read"),
        ):
            with pytest.raises(LayoutMismatch, match=f"{reason}.*or say --connect with another"):
                command.try_attaching(target, "in-place", TOLD | other)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)


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
