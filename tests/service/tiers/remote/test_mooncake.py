"""Mooncake Store: what one machine has computed another fetches; no client where that is unsafe."""

from __future__ import annotations

import ctypes
import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from patience import PATIENCE_S
from prefixcache.config import load
from prefixcache.errors import InvalidRequest
from prefixcache.service.backing import Backing
from prefixcache.service.tiers.remote import mooncake
from prefixcache.service.tiers.remote.mooncake import check_interfaces, interfaces_up
from prefixcache.service.tiers.remote.store import RemoteError
from service.service_process import LAYOUT, environment


def why_not() -> str:
    """Say why Mooncake itself cannot be run here; empty if it can."""
    found = importlib.util.find_spec("mooncake")
    if found is None or found.origin is None:
        return "the extra 'mooncake' is not installed"
    try:
        ctypes.CDLL(str(Path(found.origin).with_name("store.so")))
    except OSError as error:
        return f"a library of Mooncake's is missing: {error}"
    told = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    return f"no network namespace to be had: {told.stderr.decode()}" if told.returncode else ""


def test_two_machines_share_what_they_compute_and_lose_nothing_but_time(tmp_path: Path) -> None:
    if why := why_not():
        pytest.skip(why)
    told = subprocess.run(
        ["unshare", "-n", sys.executable, "-m", "service.mooncake_machines", str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
        check=False,
    )
    assert told.stdout.split() == ["fetched", "lost"], told.stderr[-4000:]
    assert told.returncode == 0, told.stderr[-4000:]


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found = {"lo": "127.0.0.1", "eth0": "10.0.0.2"}
    monkeypatch.setattr(mooncake, "interfaces_up", lambda: found)
    return found


def test_the_interface_that_is_safe_gives_its_address(up: dict[str, str]) -> None:
    assert check_interfaces("eth0") == "10.0.0.2"
    del up["eth0"]
    assert check_interfaces("lo") == "127.0.0.1"


def test_a_client_is_made_only_where_all_interfaces_are_safe(up: dict[str, str]) -> None:
    with pytest.raises(RemoteError, match=r"listens on all interfaces \(lo, eth0\)"):
        check_interfaces("")
    with pytest.raises(RemoteError, match="eth0 is up beside lo"):
        check_interfaces("lo")
    up |= {"eth1": "", "wlan0": "192.168.0.3"}
    with pytest.raises(RemoteError, match="eth1, wlan0 are up beside eth0"):
        check_interfaces("eth0")
    up.clear()
    with pytest.raises(RemoteError, match="eth0 is not up"):
        check_interfaces("eth0")


def test_a_service_does_not_start_where_it_is_not_safe(up: dict[str, str]) -> None:
    flags = {"remote": "mooncake://127.0.0.1:1", "memory": 2**20, "layout": str(LAYOUT)}
    with pytest.raises(
        InvalidRequest, match=r"--remote mooncake://127\.0\.0\.1:1: a Mooncake client"
    ):
        Backing(load(flags))
    with pytest.raises(InvalidRequest, match="eth0 is up beside lo"):
        Backing(load(flags | {"remote_interface": "lo"}))
    with pytest.raises(InvalidRequest, match="--remote-interface is for"):
        Backing(load(flags | {"remote": "valkey+unix:///s", "remote_interface": "lo"}))


def test_the_interfaces_of_this_machine_are_seen() -> None:
    found = interfaces_up()
    assert set(found) <= {name for _, name in socket.if_nameindex()}
    assert found.get("lo", "127.0.0.1") == "127.0.0.1"
