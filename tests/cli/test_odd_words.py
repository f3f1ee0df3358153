"""Odd words of a command line: an answer or one line of refusal; nothing is ignored or guessed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

import prefixcache
from cli.running import At, Told, call, run
from prefixcache.cli.codes import EXIT_NEGATIVE, EXIT_NO_SERVER, EXIT_OK, EXIT_USAGE
from prefixcache.texts import is_plain
from service.service_process import LAYOUT

ODD = (
    *("", "0", "-1", "1.5", "nan", "inf", "-inf", "1e999", "9" * 20, "9" * 5000, "0x10", "1_000"),
    *("٣", "²", "None", "~", "~nobody/x", "/", "..", "../../etc/passwd", "a/b", "a b", "x" * 5000),
    *("\udcff", "\u202e", "\x1b[31m", "\n", "nul\0byte", "{}", "-2GiB", "1e3GiB", "1.5", "9" * 50),
    *(
        "0B",
        "1B",
        "99999999TiB",
        "-",
        "--",
        "@",
        "%s",
        "{0}",
        "/dev/null",
        "/dev/full",
        "/dev/zero",
    ),
    *("unix:", "unix:/", "unix:/" + "x" * 200, "tcp://x", "localhost:", "127.0.0.1:1", "[::1]:1"),
)
OPTIONS = {
    "top --once": ("--interval", "--sort", "--svg", "--tokenizer", "--connect"),
    "doctor": ("--stalled-after", "--connect"),
    "what-if": ("--connect",),
    "quota": ("--max", "--share", "--model", "--adapter", "--tenant", "--salt", "--connect"),
    "quota --model m": ("--max", "--share", "--adapter", "--tenant", "--salt"),
    "stat -n 1": ("--interval", "--mark", "--since", "--connect"),
    "stat --once": ("--count", "--connect"),
    "tree": ("--depth", "--namespace", "--limit", "--sort", "--svg", "--tokenizer", "--salt"),
    "pin --model m 1 2 3": ("--ttl", "--tenant", "--salt", "--connect"),
    "lookup --model m": ("--file", "--tenant", "--salt", "--tokenizer"),
}
ENDLESS = ("--from", "--model", "--adapter", "--tenant", "--salt")


@pytest.fixture
def busy(at: At, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[At]:
    """Something is stored, and each command that writes a file writes it here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("prefixcache.cli.doctor._BETWEEN_S", 0.0)
    with (
        prefixcache.connect(at.target) as client,
        client.attach("m", LAYOUT) as session,
        session.acquire(list(range(12))) as lease,
    ):
        lease.commit(12)
        yield at


def check(told: Told, *, is_json: bool) -> None:
    """One answer, or a refusal of a few lines that can be shown anywhere."""
    assert told.code in (EXIT_OK, EXIT_NEGATIVE, EXIT_USAGE, EXIT_NO_SERVER), told
    assert all(is_plain(line) for line in (told.out + told.err).split("\n")), told
    assert len(told.err) < 8000
    if told.code in (EXIT_USAGE, EXIT_NO_SERVER):
        assert told.err.strip()
        assert len(told.err.splitlines()) <= 4
        assert not told.out
    elif is_json:
        json.loads(told.out, parse_constant=_refuse)


def _refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("word", ODD, ids=lambda word: ascii(word[:12]))
def test_any_word_in_any_place_is_answered_or_refused(busy: At, word: str) -> None:
    for start, options in OPTIONS.items():
        for option in options:
            arguments = [*start.split(), f"{option}={word}", "--json"]
            if option == "--svg":
                arguments.pop()
            told = call(*arguments, *(() if option == "--connect" else ("-c", busy.target)))
            check(told, is_json=option != "--svg")
        check(busy.call(*start.split(), word), is_json=False)
    with prefixcache.connect(busy.target) as client:  # what an odd word may well have set
        client.set_quota(prefixcache.Namespace("m"), max_held=None)


@pytest.mark.parametrize("option", ENDLESS)
def test_watch_refuses_before_it_begins(busy: At, option: str) -> None:
    for word in ("-1", "9" * 30, "nan") if option == "--from" else ("\x1b[31m", "x" * 2000):
        more = () if option in ("--from", "--model") else ("--model", "m")
        told = busy.call("watch", f"{option}={word}", *more, "--json")
        assert told.code == EXIT_USAGE
        check(told, is_json=False)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("reset --all --tenant acme", "--tenant"),
        ("reset --all --model m", "--model"),
        ("unpin --all 1 2 3", "a prompt"),
        ("pin --list --model m", "--model"),
        ("watch --adapter a", "--model"),
        ("watch --tenant t", "--model"),
        ("tree --salt s", "--namespace"),
        ("tree --svg x.svg --json", "--json"),
        ("top --svg x.svg --json", "--json"),
        ("quota --adapter a", "--model"),
        ("quota --salt s --tenant t --max 3", "--model"),
        ("stat --mark a --since b", "--since"),
        ("stat --mark a --count 2", "--count"),
        ("stat --once --interval 2", "--interval"),
    ],
)
def test_an_option_that_would_not_be_read_is_refused_and_nothing_is_done(
    busy: At, line: str, named: str
) -> None:
    told = busy.call(*line.split())
    assert (told.code, told.out) == (EXIT_USAGE, "")
    assert named in told.err
    assert busy.call("lookup", "--model", "m", *map(str, range(12))).code == EXIT_OK  # still there


@pytest.mark.parametrize("limit", ["1.5", "1B", "31B", "٣", "-1", "9" * 5000, "1e3", "2 gigs"])
def test_a_quota_that_is_no_number_of_blocks_is_not_rounded_to_none(busy: At, limit: str) -> None:
    told = busy.call("quota", "--model", "m", f"--max={limit}")
    assert told.code == EXIT_USAGE
    assert busy.call("quota").code == EXIT_NEGATIVE  # there is none


@pytest.mark.parametrize(
    "given", ["two words", "two\nlines", "mü", b"\xff\xfe", "a\0b", "x" * 9000]
)
def test_a_digest_is_made_only_of_what_a_client_can_send(given: str | bytes) -> None:
    told = call("token", "--digest", given=given)
    assert (told.code, told.out) == (EXIT_USAGE, "")
    assert told.err.count("\n") == 1
    made = call("token", "--json").fields
    assert (
        call("token", "--digest", given=made["token"] + "\n").out.split('"')[1]
        == (made["token_sha256"])
    )


@pytest.mark.parametrize(
    "kept", ["", "[]", "{}", "null", "5", '{"pid": 1}', "[" * 100_000, "\udcff", '{"at": NaN']
)
def test_a_mark_whose_file_was_changed_is_refused(busy: At, tmp_path: Path, kept: str) -> None:
    assert busy.call("stat", "--mark", "m").code == EXIT_OK
    mark = tmp_path / "prefixcache" / "marks" / "m.json"
    mark.write_bytes(kept.encode(errors="surrogateescape"))
    told = busy.call("stat", "--since", "m", "--json")
    assert (told.code, told.out, told.err.count("\n")) == (EXIT_NEGATIVE, "", 1)
    mark.unlink()
    mark.mkdir()
    assert busy.call("stat", "--since", "m").code == EXIT_NEGATIVE
    assert busy.call("stat", "--mark", "m").code == EXIT_USAGE


@pytest.mark.parametrize("verb", ["tree", "top"])
def test_a_picture_is_utf_8_whatever_the_locale(busy: At, tmp_path: Path, verb: str) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    told = run(verb, "--svg", "x.svg", "-c", busy.target, **locale)
    assert told.code == EXIT_OK
    assert (tmp_path / "x.svg").read_bytes().decode("utf-8").startswith("<svg")
