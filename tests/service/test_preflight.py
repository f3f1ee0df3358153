"""What can never work is refused by `serve` before it listens, with a layout and without."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from cli.running import Told, run
from prefixcache.cli.codes import EXIT_REFUSED, EXIT_USAGE
from prefixcache.config import ServeSettings, load
from prefixcache.errors import InvalidRequest, PoolExhausted
from prefixcache.service import preflight

LAYOUT = ("--layout", "1x1x4:float32")


def serve(tmp_path: Path, *flags: str) -> Told:
    return run("serve", "--listen", f"unix:{tmp_path}/s", *flags)


@pytest.mark.parametrize(
    ("flags", "code", "why"),
    [
        (("--policy", "bogus"), EXIT_USAGE, "no eviction policy 'bogus'"),
        (("--memory", "2"), EXIT_USAGE, "have a unit"),
        (("--policy", "bogus", *LAYOUT), EXIT_USAGE, "no eviction policy 'bogus'"),
        (("--memory", "2", *LAYOUT), EXIT_USAGE, "Raise --memory"),
        (("--memory", "500TiB", *LAYOUT), EXIT_REFUSED, "Lower --memory"),
        (("--memory", "0"), EXIT_USAGE, "--memory"),
        (("--memory", "500TiB"), EXIT_REFUSED, "Lower --memory"),
        (("--memory", "2 gigs"), EXIT_USAGE, "cannot read the size"),
        (("--block-size", "17"), EXIT_USAGE, "power of two"),
        (("--block-size", "0"), EXIT_USAGE, "--block-size"),
        (("--ghosts", "99999999999999"), EXIT_USAGE, "--ghosts"),
        (("--ghosts", "-1"), EXIT_USAGE, "--ghosts"),
        (("--ttl", "nan"), EXIT_USAGE, "--ttl"),
        (("--quarantine", "inf"), EXIT_USAGE, "--quarantine"),
        (("--grace", "1e300"), EXIT_USAGE, "--grace"),
        (("--max-message", "3GiB"), EXIT_USAGE, "--max-message"),
        (("--trace", "foo"), EXIT_USAGE, "http://127.0.0.1:4317"),
        (("--trace", "http://127.0.0.1:99999"), EXIT_USAGE, "--trace"),
        (("--state", "{tmp}/typo/state"), EXIT_USAGE, "there is no folder"),
        (("--model", "m", *LAYOUT), EXIT_USAGE, "--model and --layout both say"),
        (("--dtype", "float16", *LAYOUT), EXIT_USAGE, "--dtype is the type of"),
        (("--dtype", "float16"), EXIT_USAGE, "--dtype is the type of"),
        (("--record", "{tmp}/typo/requests"), EXIT_USAGE, "cannot record"),
        (("--shadow", "policy=bogus"), EXIT_USAGE, "no eviction policy 'bogus'"),
        (("--identities", "{tmp}/none"), EXIT_USAGE, "none"),
        (("--segments-threshold", "1", *LAYOUT), EXIT_USAGE, "is for --segments, which is not"),
        (("--http-tokens", "--max-ops", "8"), EXIT_USAGE, "is for --http, which is not given"),
    ],
    ids=lambda value: value[0] + "=" + value[1] if isinstance(value, tuple) else "",
)
def test_it_is_refused_in_one_line(
    tmp_path: Path, flags: tuple[str, ...], code: int, why: str
) -> None:
    told = serve(tmp_path, *(one.format(tmp=tmp_path) for one in flags))
    assert told.code == code, told
    assert why in told.err, told.err
    assert len(told.err.splitlines()) == 1
    assert "listening" not in told.out
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("typo")]


@pytest.mark.parametrize("flag", ["--http", "--events"])
def test_an_address_in_use_is_one_line_and_nobody_has_found_the_service(
    tmp_path: Path, flag: str
) -> None:
    if flag == "--events":
        pytest.importorskip("zmq", reason="the extra 'events' is not installed")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        place = f"127.0.0.1:{port}" if flag == "--http" else f"tcp://127.0.0.1:{port}"
        told = serve(tmp_path, flag, place)
    assert told.code == EXIT_REFUSED, told
    assert len(told.err.splitlines()) == 1
    assert str(port) in told.err
    assert "listening" not in told.out


NUMBERS = [
    name for name, field in ServeSettings.model_fields.items() if field.annotation in (int, float)
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e400", "9" * 30, "", "x"])
def test_a_number_that_cannot_be_is_refused_whichever_it_is(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=name.replace("_", "-")):
        load({name: value})


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ({"disk_write": 1}, "--disk"),
        ({"remote_secret": "f"}, "--remote"),
        ({"remote_interface": "lo"}, "--remote"),
        ({"segments_threshold": 0.5}, "--segments"),
        ({"http_tokens": True}, "--http"),
        ({"events_replay": "ipc:///f"}, "--events"),
        ({"max_shadow_lag": 1}, "--shadow"),
        ({"device": 1}, "--pool cuda"),
    ],
)
def test_what_means_something_only_beside_another_setting_is_refused_without(
    given: dict[str, object], other: str
) -> None:
    (name,) = given
    told = f"--{name.replace('_', '-')} is .*{other}, which is not given"
    with pytest.raises(InvalidRequest, match=told):
        preflight.check(load(given), {})


@pytest.mark.parametrize("option", ["disk", "state"])
def test_a_folder_with_all_of_a_disk_in_it_is_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    for name in ("domain-acme", "other"):
        (tmp_path / name).mkdir()
        for file in ("slab", "pool"):
            (tmp_path / name / file).write_bytes(b"x" * (1 << 20))
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    monkeypatch.setattr(Path, "glob", None)
    value = str(tmp_path) if option == "state" else f"{1 << 19}:{tmp_path}"
    settings = load({"memory": 1 << 19, option: value, "layout": "1x1x4:float32"})
    preflight.check(settings, {"acme": 1 << 19})
    with pytest.raises(PoolExhausted, match="Lower"):
        preflight.check(settings, {"other-": 1 << 19})


def test_what_a_tier_on_disk_has_there_already_is_no_room_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that is full of it the next service starts, too."""
    folder = tmp_path / "disk"
    folder.mkdir(mode=0o700)
    (folder / "slab").write_bytes(b"x" * (1 << 20))
    (folder / "heads").write_bytes(b"x" * (1 << 18))
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    own = {"memory": 1 << 20, "layout": "1x1x4:float32"}
    preflight.check(load(own | {"disk": f"{(1 << 20) + (1 << 18)}:{folder}"}), {})
    with pytest.raises(PoolExhausted, match="Lower it"):
        preflight.check(load(own | {"disk": f"{1 << 21}:{folder}"}), {})
