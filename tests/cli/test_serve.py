"""The flags of `prefixcache serve` are the fields of the settings, and help is made of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cli.running import call
from prefixcache.cli.codes import EXIT_USAGE
from prefixcache.config import ServeSettings, parse_shadow
from prefixcache.service import server
from prefixcache.types import Partial


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    """What the service would be started with."""
    found: list[ServeSettings] = []

    def run(settings: ServeSettings, _: Any) -> int:
        found.append(settings)
        return 0

    monkeypatch.setattr(server, "run", run)
    return found


def test_help_shows_every_setting_once_with_its_default() -> None:
    help_text = call("serve", "--help").out
    flags = re.findall(r"^  --([a-z-]+) ", help_text, re.MULTILINE)
    assert sorted(flags) == sorted(name.replace("_", "-") for name in ServeSettings.model_fields)
    told = re.sub(r"\s+", " ", help_text)
    for shown in (
        *(
            "Memory of the pool. Default: 2GiB.",
            "Life of a lease without a heartbeat. Default: 30.",
        ),
        *("0 to 1. Default: 0.25.", "Longest time of one pin. Default: 604800."),
        *("blocks or tails. Default: tails.", "ask what there is. Default: on."),
        *("remember, to explain misses. Default: as many as blocks.", "ipc://PATH. Default: off."),
        "Its key. --",
    ):
        assert shown in told


def test_flags_arrive_as_what_the_fields_are(served: list[ServeSettings]) -> None:
    told = call(
        *("serve", "--memory", "1MiB", "--ghosts", "3", "--pin-cap", "0.5", "--state", "/x"),
        *("--listen", "unix:/a,unix:/b", "--shadow", "policy=slru"),
        *("--layout", "1x2x4:float32", "--partial", "off", "--no-reflection", "--http-tokens"),
    )
    assert told.code == 0, told
    (found,) = served
    assert (found.memory, found.ghosts, found.pin_cap, found.state) == (2**20, 3, 0.5, Path("/x"))
    assert (found.reflection, found.http_tokens, found.anonymise) == (False, True, False)
    assert (str(found.layout), found.partial) == ("1x2x4:float32", Partial.OFF)
    assert found.shadow == [parse_shadow("policy=slru")]
    for name in ("block_size", "dtype", "max_pin", "trace", "tls_key"):
        assert getattr(found, name) == ServeSettings.model_fields[name].default, name


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--block-size", "x"), ("--ghosts", "1.5"), ("--ttl", "long"), ("--memory", "2Q")],
)
def test_what_is_no_such_value_is_a_usage_error_that_names_the_flag(
    served: list[ServeSettings], flag: str, value: str
) -> None:
    told = call("serve", flag, value)
    assert told.code == EXIT_USAGE
    assert flag in told.err
    assert not served
