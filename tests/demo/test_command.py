import json

import pytest
import typer
from typer.testing import CliRunner

from prefixcache_worker.demo import chats, command
from prefixcache_worker.demo.scenario import _interleaved
from prefixcache_worker.demo.transcript import Transcript


@pytest.fixture
def run():
    app = typer.Typer()
    app.command("demo")(command.demo)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_help_names_every_option(run):
    result = run("--help")
    assert result.exit_code == 0
    for option in ("--quick", "--workers", "--model", "--tokens", "--report", "--json"):
        assert option in result.output


def test_a_number_of_workers_that_makes_no_sense_is_a_usage_error(run):
    assert run("--workers", "0").exit_code == 2


def test_a_model_that_is_not_there_is_a_usage_error_with_a_reason(run, tmp_path):
    result = run("--model", str(tmp_path / "nothing"))
    assert result.exit_code == 2
    assert "cannot use this model" in result.output


def test_a_model_without_a_chat_template_is_refused_with_a_reason(run, tmp_path):
    vocabulary = {"a": 0, "b": 1, "<s>": 2}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<s>"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    result = run("--model", str(tmp_path))
    assert result.exit_code == 2
    assert "no chat template" in result.output


def test_two_chats_of_every_new_assistant_begin_together():
    workload = chats.load()
    played = {chat.id for chat in workload.chats if chat.assistant.name == "bicycle"}
    order = _interleaved(workload.chats, played)
    assert sorted(chat.id for chat in order) == sorted(chat.id for chat in workload.chats)
    first = [chat.assistant.name for chat in order[:10]]
    assert first[::2] == first[1::2]
    assert len(set(first)) == 5


class Forgetful:
    """A tokeniser whose template drops earlier answers, as some models' templates do."""

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        kept = [m for m in conversation if m["role"] != "assistant"]
        return "".join(f"<{m['content']}>" for m in kept)

    def encode(self, text, *, add_special_tokens):
        return list(text.encode())

    def decode(self, token_ids, *, skip_special_tokens):
        return bytes(token_ids).decode()


def test_a_template_that_rewrites_the_history_is_followed():
    chat = chats.Chat("c", chats.Assistant("a", "A", "be brief"), ("one", "two"))
    transcript = Transcript(chat, Forgetful(), frozenset())
    assert bytes(transcript.ask(0)) == b"<be brief><one>"
    assert transcript.answer(b"yes") == "yes"
    assert bytes(transcript.ask(1)) == b"<be brief><one><two>"
