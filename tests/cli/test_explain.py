"""`prefixcache explain`: prompts in every form, requests of a moment ago, and the advice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import prefixcache
from cli.conftest import REST, SYSTEM
from cli.running import At, call, run
from prefixcache.client import Session
from prefixcache.types import pack
from service.service_process import LAYOUT


def store(session: Session, tokens: list[int], request_id: str = "") -> None:
    with session.acquire(tokens, request_id=request_id) as lease:
        lease.commit(len(tokens))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ids.txt", b"0 1 2\n3, 4;5"),
        ("ids.json", b"[0, 1, 2, 3, 4, 5]"),
        ("object.json", b'{"prompt_token_ids": [0, 1, 2, 3, 4, 5]}'),
        ("packed.bin", pack(range(6))),
    ],
)
def test_token_ids_are_read_in_every_form(
    session: Session, at: At, tmp_path: Path, name: str, content: bytes
) -> None:
    store(session, list(range(10)))
    (tmp_path / name).write_bytes(content)
    fields = at.call("explain", str(tmp_path / name), "--model", "tiny", "--json").fields
    assert fields["ledger"]["total"] == 6
    assert fields["ledger"]["hit"] + fields["ledger"]["partial"] == 5
    if not name.endswith(".bin"):
        told = at.call("explain", "-", "--model", "tiny", "--json", given=content)
        assert told.fields["ledger"] == fields["ledger"]


def test_requests_that_part_at_a_date_are_told_to_move_it(
    session: Session, at: At, folder: Path, tmp_path: Path
) -> None:
    from prefixcache.cli.decoder import Decoder

    decoder = Decoder(folder)
    for day in range(3, 9):
        store(session, decoder.encode(f"{SYSTEM}{day} : 27 - 2026{REST}hello"))
    (tmp_path / "prompt.txt").write_text(f"{SYSTEM}1 : 27 - 2026{REST}hello")
    told = at.call(
        *("explain", str(tmp_path / "prompt.txt"), "--model", "tiny"),
        *("--tokenizer", str(folder)),
    )
    assert told.code == 0, told.err
    lines = told.out.splitlines()
    assert "parts from the closest stored prompt at token 15" in lines
    assert any(line.startswith("  yours   1 : 27 - 2026") for line in lines)
    assert any(line.startswith("  stored  ") and " : 27 - 2026 " in line for line in lines)
    assert "  5 requests of the last hour parted there" in lines
    advice = " ".join(told.out.partition("advice: ")[2].split())
    assert advice.startswith("5 requests part at token 15: a ")
    assert "Move that token behind the" in advice
    assert advice.endswith("which are the same again.")


def test_a_chat_goes_through_the_models_template(
    session: Session, at: At, folder: Path, tmp_path: Path
) -> None:
    store(session, [1, 2])
    chat = tmp_path / "chat.json"
    chat.write_text('{"messages": [{"role": "user", "content": "hello old guide"}]}')
    told = at.call("explain", str(chat), "--model", "tiny", "--tokenizer", str(folder), "--json")
    assert told.fields["ledger"]["total"] == 5  # user, three words, the end


def test_a_request_of_a_moment_ago_is_explained_by_its_id(session: Session, at: At) -> None:
    store(session, list(range(20)), "one/0")
    store(session, [*range(10), 70, 71], "two/0")
    told = at.call("explain", "two")
    assert told.code == 0
    assert told.out.startswith("two/0 of ann#")
    assert "parts from the closest stored prompt at token 10" in told.out
    assert "now 11 of its 12 tokens would be reused" in told.out
    fields = at.call("explain", "two/0", "--json").fields
    assert fields["request"]["worker"] == "ann"
    assert (fields["parted_at"], fields["stored_next"][:2], fields["reused_now"]) == (
        10,
        [10, 11],
        11,
    )


def test_a_request_behind_a_salt_is_explained_only_to_who_names_it(at: At) -> None:
    with prefixcache.connect(at.target) as client:
        session = client.attach("tiny", LAYOUT, salt="s3cret")
        store(session, list(range(12)), "hidden")
        told = at.call("explain", "hidden")
        assert (told.code, "no recent request" in told.err) == (1, True)
        told = at.call("explain", "hidden", "--model", "tiny", "--salt", "s3cret", "--json")
        assert told.fields["ledger"]["cold"] == 12
        assert "s3cret" not in told.out
        client.reset(prefixcache.Namespace("tiny", salt="s3cret"))


def test_what_was_evicted_names_the_memory_that_would_have_kept_it(
    session: Session, at: At
) -> None:
    for first in range(100, 104):
        store(session, [first] * 80)  # 20 blocks each, of 64
    told = at.call("explain", *["100"] * 80, "--model", "tiny")
    assert "░ evicted" in told.out
    advice = " ".join(told.out.partition("advice: ")[2].split())
    assert "blocks more" in advice
    assert "serve with --memory" in advice


@pytest.mark.parametrize(
    ("arguments", "given", "code", "text"),
    [
        (["nosuchrequest"], "", 1, "no recent request"),
        (["--file", "/nonexistent"], "", 2, "/nonexistent"),
        (["-"], "", 2, "empty"),
        (["-"], "some text", 2, "--tokenizer"),
        (["-"], '{"what": 1}', 2, "neither token ids nor a chat"),
        (["-"], b"\xff\xfe\x00", 2, "neither text nor JSON"),
        (["1", "x"], "", 2, "'x'"),
        (["-", "--tokenizer", "/nonexistent"], "1 2", 2, "tokenizer.json"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(
    session: Session, at: At, arguments: list[str], given: str, code: int, text: str
) -> None:
    store(session, [1, 2])
    told = at.call("explain", *arguments, "--model", "tiny", given=given)
    assert (told.code, told.out) == (code, "")
    assert text in told.err
    assert told.err.count("\n") == 1


def chat_in(path: Path, folder: Path, **files: bytes) -> list[str]:
    """Leave a model's folder with these files, and a chat; give the words that encode it."""
    path.mkdir()
    (path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content)
    (path / "chat").write_text('{"messages": [{"role": "user", "content": "hello"}]}')
    return ["encode", str(path / "chat"), "--tokenizer", str(path)]


@pytest.mark.parametrize("name", ["tokenizer_config__json", "chat_template__jinja"])
def test_a_models_template_is_utf_8_whatever_the_locale(
    folder: Path, tmp_path: Path, name: str
) -> None:
    template = "{% for m in messages %}\u00e4 {{ m.content }} <|end|> {% endfor %}"
    content = template if "jinja" in name else json.dumps({"chat_template": template})
    words = chat_in(tmp_path / "m", folder, **{name: content.replace("\\u00e4", "ä").encode()})
    plain = run(*words)
    other = run(*words, LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (other.code, other.out, other.err) == (0, plain.out, "")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("chat_template__jinja", b"\xff\xfe{{ x", "jinja is not UTF-8"),
        ("tokenizer_config__json", b'{"chat_template": "x",', "is no JSON"),
        ("tokenizer_config__json", b"[5]", "has no chat template"),
        ("tokenizer_config__json", b'{"chat_template": [5, "x", {}]}', "has no chat template"),
        ("tokenizer_config__json", b'{"chat_template": [{"name": []}]}', "has no chat template"),
    ],
)
def test_a_broken_template_of_a_model_is_refused_by_what_is_wrong(
    folder: Path, tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    answer = call(*chat_in(tmp_path / "m", folder, **{name: content}))
    assert answer.code == 2
    assert told in answer.err
    assert "unforeseen" not in answer.err
