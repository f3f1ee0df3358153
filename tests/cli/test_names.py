"""Names are what somebody else chose: no path, no escape sequence, no line of their own."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import prefixcache
from cli.running import At
from prefixcache.cli import decoder, marks, streams, view
from prefixcache.cli.decoder import open_decoder
from prefixcache.cli.icicle import draw
from prefixcache.client.address import Address
from prefixcache.config import load
from prefixcache.errors import CacheError, InvalidRequest
from prefixcache.model_folders import own_cache
from prefixcache.plain_json import json_parts, json_text
from prefixcache.service.persistence.directory import StateDirectory
from prefixcache.service.pool.model_layout import read_layout
from prefixcache.types import Namespace
from prefixcache_bench.experiments.layouts import layout_named
from prefixcache_bench.experiments.readers import tokenizers
from prefixcache_serving.running import Setup
from service.service_process import LAYOUT

ODD = (
    *("x" * 300, "~nobody/x", "~", "~/", "/" + "y" * 300, "/etc", "..", ".", "../..", "a/../b"),
    *("a/b/c", "//", "a//b", "-", "@", "@" + "r" * 300, "a@../..", "models--a", "C:\\x", "a b"),
    *("\N{GRINNING FACE}", "...", ".hidden", "a" * 96 + "/" + "b" * 96, "tokenizer.json"),
)
QUESTIONS = (
    *(("tree",), ("tree", "--svg", "{tmp}/t.svg"), ("top", "--once"), ("stat", "--once")),
    *(("explain", "--model", "{name}", "1", "2"), ("lookup", "--model", "{name}", "1", "2")),
    *(("doctor",), ("pin", "--list"), ("reset", "--model", "{name}")),
)


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What the file system is asked for outside the folder of caches."""
    asked: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("PREFIXCACHE_CACHE", "PREFIXCACHE_TOKENIZER", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    for call in ("stat", "scandir", "listdir", "open"):
        real = getattr(os, call)

        def looked(path: Any, *rest: Any, real: Any = real, **options: Any) -> Any:
            if not str(os.path.realpath(path)).startswith(str(tmp_path)):
                asked.append(str(path))
            return real(path, *rest, **options)

        monkeypatch.setattr(os, call, looked)
    return asked


@pytest.mark.parametrize("name", [*ODD, "nul\0byte", "\udcff"])
def test_a_model_s_name_is_looked_for_below_the_caches_only(
    name: str, forbidden: list[str]
) -> None:
    assert open_decoder(None, Namespace(name)) is None
    assert forbidden == []


def test_a_cache_that_cannot_be_read_means_token_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "prefixcache" / "m" / "tokenizer.json").mkdir(parents=True)
    assert open_decoder(None, Namespace("m")) is None
    for error in (OSError, InvalidRequest, ValueError, PermissionError):

        def fail(model: str, error: type[Exception] = error) -> Any:
            raise error("no home")

        monkeypatch.setattr(decoder, "places", fail)
        assert open_decoder(None, Namespace("m")) is None


def test_a_name_that_no_file_can_have_is_one_that_is_not_there() -> None:
    name = "x" * 400
    for use in (layout_named, tokenizers.named):
        with pytest.raises(InvalidRequest, match=r"no layout|no tokenizer"):
            use(name)
    for look in (read_layout, decoder.Decoder):
        with pytest.raises(InvalidRequest, match="there is no"):
            look(Path(name))


def test_an_empty_word_is_no_folder_and_no_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `--state "$WHERE"` is one where no such variable is set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFIXCACHE_TARGET", f"unix:{tmp_path}/s.sock")
    for name in ("state", "identities", "model", "events_replay", "tls_key", "dtype", "policy"):
        with pytest.raises(InvalidRequest, match=f"--{name.replace('_', '-')} is empty"):
            load({name: ""})
    with pytest.raises(InvalidRequest, match="cannot read the address ''"):
        prefixcache.connect("")
    with pytest.raises(InvalidRequest, match="cannot read the address ''"):
        asyncio.run(prefixcache.connect_async(""))
    how: dict[str, Any] = {field.name: 1 for field in dataclasses.fields(Setup)}
    how |= {"model": "m", "name": "m", "dtype": "float32", "weights": "packed", "target": None}
    Setup(**how | {"invariant": False}).check()
    for odd, said in (({"model": ""}, "--model is empty"), ({"target": ""}, "the address ''")):
        with pytest.raises(InvalidRequest, match=said):
            Setup(**how | odd).check()
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_is_not_there_is_told_and_what_lies_in_it_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for use in (Address.parse, lambda path: StateDirectory(Path(path)), tokenizers.named):
        with pytest.raises(InvalidRequest, match=r"'~nobody-of-that-name/x': there is no such"):
            use("~nobody-of-that-name/x")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)  # a container's user that no table knows
    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "PREFIXCACHE_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    assert open_decoder(None, Namespace("m")) is None
    with pytest.raises(InvalidRequest, match=r"has no home: set \$HOME or \$XDG_STATE_HOME"):
        marks.difference("before", {})  # type: ignore[arg-type]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert own_cache() == tmp_path / "prefixcache"


@pytest.mark.parametrize("name", ODD)
def test_any_name_of_another_worker_leaves_every_command_standing(
    at: At, tmp_path: Path, name: str
) -> None:
    with prefixcache.connect(at.target) as client:
        with client.attach(name, LAYOUT) as session, session.acquire([1, 2, 3, 4, 5]) as lease:
            lease.commit(5)
        for question in QUESTIONS:
            told = at.call(*(one.format(name=name, tmp=tmp_path) for one in question))
            assert told.code in (0, 1, 2), told
            assert "unforeseen" not in told.err
        client.reset(Namespace(name))


HOSTILE = "a\x1b]0;title\x07\x1b[2Jb\nfake line\r\u202eevil\x9b2J\u200b\x00"


def test_what_an_older_service_lets_through_is_escaped_where_it_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view.tell("namespace " + view.show_namespace(Namespace(HOSTILE.replace("\n", ""), "ad\x1b[1m")))
    view.print_table([("name", "blocks"), (HOSTILE, "3")])
    view.print_json({"name": HOSTILE, "letters": "müller"})
    streams.say(str(CacheError(HOSTILE)))
    told = capsys.readouterr()
    for line in (told.out + told.err).split("\n"):
        assert line.isprintable(), line
    assert "müller" in told.out
    assert "fake line" not in {line.strip() for line in told.out.splitlines()}
    assert len(told.err.splitlines()) == 1


def test_what_is_drawn_is_xml_and_plain(at: At) -> None:
    import xml.dom.minidom

    with prefixcache.connect(at.target) as client:
        with client.attach("m", LAYOUT) as session, session.acquire([1, 2, 3, 4, 5]) as lease:
            lease.commit(5)
        (part,) = client.outline(Namespace("m")).namespaces
    drawn = draw([(replace(part, namespace=Namespace(HOSTILE)), None)])
    xml.dom.minidom.parseString(drawn)  # noqa: S318 - our own
    assert "\x1b" not in drawn


def test_commands_print_by_the_one_function_that_escapes() -> None:
    folder = Path(view.__file__).parent
    spare = {"view.py", "main.py", "plugins.py", "serve.py"}
    for path in folder.glob("*.py"):
        if path.name not in spare:
            assert not re.search(r"typer\.echo|^\s*print\(", path.read_text(), re.MULTILINE), (
                path.name
            )
    assert json_text("\x1b", ensure_ascii=False) == '"\\u001b"'


def test_what_is_written_in_parts_is_the_same() -> None:
    long = [{"token": number, "top": [[1.5, float("inf")]] * 3} for number in range(600)]
    value = {"a": long, "b": [long, [], {}, "é\u202e", None], "ü": {"c": [1, [2, [3]]]}}
    for options in ({}, {"ensure_ascii": False, "separators": (",", ":")}):
        parts = list(json_parts(value, **options))
        assert "".join(parts) == json_text(value, **options)
        assert max(map(len, parts)) < len("".join(parts)) / 4
