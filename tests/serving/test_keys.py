from __future__ import annotations

from pathlib import Path

import pytest

from prefixcache.errors import InvalidRequest
from prefixcache_serving.keys import Keys


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_key_names_its_tenant(tmp_path: Path) -> None:
    keys = Keys(write(tmp_path / "keys", "aaaaaaaaaaaaaaaa red\nbbbbbbbbbbbbbbbb blue\n"))
    assert keys.tenant("Bearer aaaaaaaaaaaaaaaa") == "red"
    assert keys.tenant("bearer  bbbbbbbbbbbbbbbb") == "blue"
    assert keys.tenants == {"red", "blue"}


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="chmod"):
        Keys(write(tmp_path / "keys", "aaaaaaaaaaaaaaaa\n", 0o644))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "holds no key"),
        ("# none\n", "holds no key"),
        ("short\n", "line 1"),
        ("aaaaaaaaaaaaaaaa a b\n", "line 1"),
        ("aaaaaaaaaaaaaaaa\naaaaaaaaaaaaaaaa other\n", "line 2: the key is there twice"),
        ("ключ-из-многих-знаков\n", "line 1"),
        ("aaaaaaaaaaaaaaaa \x1b[2J\n", "tenant"),
    ],
)
def test_lines_that_are_none_are_named(tmp_path: Path, text: str, wanted: str) -> None:
    with pytest.raises(InvalidRequest, match=wanted):
        Keys(write(tmp_path / "keys", text))
