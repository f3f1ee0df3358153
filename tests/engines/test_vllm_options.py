"""What a user says to prefixcache inside of vLLM's settings."""

from types import SimpleNamespace
from typing import Any

import pytest

from prefixcache.errors import InvalidRequest
from prefixcache_vllm.options import Options


def test_a_connectors_own_settings_count_before_the_common_ones() -> None:
    config = SimpleNamespace(
        additional_config={"prefixcache": {"connect": "unix:a", "reserve": 16}, "other": 1},
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config={"connect": "unix:b"}),
    )
    assert Options.of(config) == Options(connect="unix:b", reserve=16)
    config.kv_transfer_config = None
    assert Options.of(config).connect == "unix:a"
    config.additional_config = object()  # another plugin's own kind of settings
    assert Options.of(config) == Options()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"conect": "unix:a"}, "no setting conect; it has ahead, connect"),
        ({3: 1}, "no setting 3"),
        ({"reserve": 0}, "reserve is 0: a whole number of at least 1"),
        ({"reserve": True}, "reserve is True"),
        ({"ahead": "8"}, "ahead is '8'"),
        ({"spare_blocks": -1}, "spare_blocks is -1: a whole number of at least 0"),
        ({"wait_s": float("nan")}, "wait_s is nan: seconds"),
        ({"wait_s": -1}, "wait_s is -1"),
        ({"connect": 5}, "connect is 5: a text"),
        ("unix:a", "prefixcache is 'unix:a': settings by name"),
    ],
    ids=str,
)
def test_what_is_no_setting_is_refused_by_name(said: Any, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        Options.read(said)
