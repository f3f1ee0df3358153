"""`lookup`, `pin`, `unpin`, `explain` and `encode` read a prompt in the same forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.conftest import SYSTEM
from cli.running import At, Told, call
from prefixcache.cli import source, view
from prefixcache.client import Session
from prefixcache.errors import InvalidRequest, NotFound
from prefixcache.types import (
    Explanation,
    LeaseId,
    Ledger,
    Namespace,
    PastRequest,
    Snapshot,
    pack,
)

CHAT = [{"role": "user", "content": "hello old user"}]
VERBS = ("lookup", "explain", "pin", "unpin")


@pytest.fixture
def stored(session: Session, folder: Path) -> list[int]:
    """A prompt of twelve tokens that is stored, as its text's tokenizer has it."""
    ids = [int(one) for one in encode("--text", *SYSTEM.split()[:12], folder=folder).out.split()]
    assert len(ids) == 12
    with session.acquire(ids, request_id="monday-7") as lease:
        lease.commit(len(ids))
    return ids


def encode(*arguments: str, folder: Path, given: str | bytes = "") -> Told:
    told = call("encode", *arguments, "--tokenizer", str(folder), given=given)
    assert told.code == 0, told
    return told


def found(told: Told, verb: str) -> int:
    """How many tokens of the prompt the command found."""
    assert told.err == "", told
    fields = told.fields
    if verb == "lookup":
        assert fields["num_hit"] + fields["num_partial"] >= fields["num_tokens"] - 1  # all but one
    if verb == "explain":
        return int(fields["ledger"]["total"])
    return int(fields["num_tokens"])


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "form",
    [
        "ids",
        "one argument",
        "list",
        "text file",
        "-f",
        "stdin",
        "words",
        "packed",
        "request",
        "bom",
    ],
)
def test_every_command_takes_every_form(
    at: At, stored: list[int], folder: Path, tmp_path: Path, verb: str, form: str
) -> None:
    text, ids = " ".join(SYSTEM.split()[:12]), [str(one) for one in stored]
    path = tmp_path / "prompt.txt"
    path.write_text(text)
    (tmp_path / "prompt.bin").write_bytes(pack(stored))
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + " ".join(ids).encode())
    arguments, given = {
        "ids": (ids, ""),
        "one argument": ([" ".join(ids)], ""),
        "list": ([json.dumps(stored)], ""),
        "text file": ([str(path)], ""),
        "-f": (["-f", str(path)], ""),
        "stdin": (["-"], text),
        "words": (["--text", *text.split()], ""),
        "packed": ([str(tmp_path / "prompt.bin")], ""),
        "request": (["monday-7"], ""),
        "bom": ([str(tmp_path / "bom.txt")], ""),
    }[form]
    flags = ["--model", "tiny", "--tokenizer", str(folder), "--json"]
    if verb == "unpin":
        assert at.call("pin", *arguments, *flags, given=given).code == 0
    told = at.call(verb, *arguments, *flags, given=given)
    assert told.code == (1 if (verb, form) == ("explain", "request") else 0)  # it was not, then
    assert found(told, verb) == 12


def test_what_encode_prints_is_what_the_others_take(at: At, session: Session, folder: Path) -> None:
    ids = encode("-", folder=folder, given=json.dumps(CHAT)).out
    assert encode("--json", "-", folder=folder, given=json.dumps(CHAT)).fields["tokens"] == [
        int(one) for one in ids.split()
    ]
    with session.acquire([int(one) for one in ids.split()]) as lease:
        lease.commit(len(ids.split()))
    told = at.call("lookup", "--model", "tiny", "--json", given=ids)
    assert found(told, "lookup") == len(ids.split())


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("arguments", "given", "code", "text"),
    [
        (["Once upon a time"], "", 1, "add --text"),
        (["x" * 5000], "", 1, "add --text"),
        (["nul\0byte"], "", 1, "add --text"),
        (["/"], "", 1, "add --text"),
        (["-f", "/nonexistent"], "", 2, "no file /nonexistent"),
        (["-f", "/"], "", 2, "no file /"),
        (["1", "2", "-f", "x"], "", 2, "not both"),
        (["1", "two"], "", 2, "'two' in the arguments is not a token id"),
        (["1", "2.5"], "", 2, "'2.5' in the arguments is not a token id; to take it as text"),
        (["-"], "1.0 2.0", 2, "'1.0' in stdin is not a token id; to take it as text"),
        (["-"], "", 2, "empty"),
        (["-"], '[{"role": "user", "content": "a"},]', 2, "begins like JSON and is none"),
        (["-"], "[" * 100_000, 2, "begins like JSON and is none"),
        (["-"], '{"prompt": "a", "prompt": "b"}', 2, "the field 'prompt' is there twice"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line_that_says_what_to_do(
    at: At, stored: list[int], verb: str, arguments: list[str], given: str, code: int, text: str
) -> None:
    told = at.call(verb, *arguments, "--model", "tiny", given=given)
    assert (told.code, told.out) == (code, "")
    assert text in told.err
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_a_token_id_that_is_a_file_s_name_is_neither_in_silence(
    at: At, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    (tmp_path / "123").write_text("7 8 9")
    monkeypatch.chdir(tmp_path)
    told = at.call(verb, "123", "--model", "tiny")
    assert (told.code, told.out) == (2, "")
    assert "--file 123 for the file" in told.err


def test_a_prompt_that_is_no_more_kept_whole_is_not_pinned_in_part() -> None:
    past = PastRequest("r", "w", LeaseId(1), Namespace("tiny"), 2.0, 9, pack([1, 2]))
    told = Explanation((), Ledger(), None, b"", 0, past=past)
    with pytest.raises(NotFound, match="of the 9 tokens"):
        source.whole(source.Found(pack([1, 2]), Namespace("tiny"), told))


def test_an_empty_model_names_no_namespace(at: At, session: Session) -> None:
    for verb in VERBS:
        told = at.call(verb, "--model", "", "1", "2")
        assert (told.code, told.err) == (
            2, "prefixcache: --model is empty; give a name, or leave the option out\n"
        )  # fmt: skip


def test_who_names_no_namespace_is_told_of_a_few_of_many() -> None:
    known = {Namespace(f"{n:03}{'x' * 1000}"): Ledger() for n in range(200)}
    nobody = view.Chosen(None, "", "", "")
    with pytest.raises(InvalidRequest, match=r"000x+…, .* and 15,980 more$") as refused:
        nobody.choose(Snapshot(namespaces=known, num_namespaces=16_000))
    assert len(str(refused.value)) < 2000


def test_a_file_without_its_tokenizer_is_named_once(
    at: At, session: Session, tmp_path: Path
) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"messages": CHAT}))
    told = at.call("lookup", str(path), "--model", "of which there is no tokenizer")
    assert told.code == 2
    assert told.err.count("chat.json") == 1, told


def test_quotas_take_sizes_and_say_when_nobody_has_that_name(at: At, session: Session) -> None:
    told = at.call("quota", "--model", "tiny", "--max", "1KiB", "--share", "128B", "--json")
    at.call("quota", "--model", "tiny", "--max", "none", "--share", "0")
    (quota,) = told.fields["quotas"]
    assert (quota["max_held"], quota["guaranteed"], told.err) == (8, 1, "")
    told = at.call("quota", "--model", "nosuch", "--max", "5")
    assert "the service knows no namespace nosuch yet" in told.err
    told = at.call("quota", "--tenant", "nosuch", "--max", "none")
    assert "the service knows no tenant 'nosuch' yet" in told.err
    assert at.call("quota", "--model", "tiny", "--max", "2 gigs").code == 2
    assert at.call("quota", "--model", "tiny", "--share", "none").code == 2
