from __future__ import annotations

from pathlib import Path

import pytest

from experiments.conftest import SMALL
from prefixcache_bench.reports import experiments


def test_the_page_shows_the_command_its_output_and_its_picture(tmp_path: Path) -> None:
    question = experiments.Question(
        "How much?", "Before.", "curve CHATS --capacity 50% -o PICTURE", "After.", "much"
    )
    page = experiments._ask(question, {"CHATS": (str(SMALL), "chats.jsonl")}, tmp_path)
    assert page.startswith("## How much?\n\nBefore.\n\n```console\n$ prefixcache curve chats.jsonl")
    assert "knee" in page
    assert page.endswith("![How much?](experiments/much.png)\n\nAfter.")
    assert (tmp_path / "much.png").exists()
    assert "# command: prefixcache curve chats.jsonl" in (tmp_path / "much.csv").read_text()
    assert str(tmp_path) not in page


def test_every_question_names_a_trace_and_a_picture() -> None:
    for question in experiments.QUESTIONS:
        words = question.command.split()
        assert words[1] in {"CHATS", "HASHED"}
        assert "PICTURE" in words
    assert len({question.picture for question in experiments.QUESTIONS}) == len(
        experiments.QUESTIONS
    )


def test_one_question_can_be_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = tuple(
        experiments.Question(f"{name}?", name, "curve CHATS --capacity 50% -o PICTURE", "So.", name)
        for name in ("first", "second", "third")
    )
    monkeypatch.setattr(experiments, "QUESTIONS", questions)
    page, places = tmp_path / "page.md", {"CHATS": (str(SMALL), "chats.jsonl")}
    rest = "## What is counted, exactly\n\nThis.\n"
    page.write_text(f"# Head\n\n## first?\n\nold\n\n## third?\n\nold\n\n{rest}")
    experiments._renew(page, ["second"], places, tmp_path)
    once = page.read_text()
    assert once.startswith("# Head\n\n## first?\n\nold\n\n## second?\n\nsecond\n\n```console\n")
    assert once.endswith(f"## third?\n\nold\n\n{rest}")
    assert "Made from commit " in once
    experiments._renew(page, ["second", "third"], places, tmp_path)
    again = page.read_text()
    assert again.count("## second?") == again.count("## third?") == 1
    assert "third\n\n```console" in again
    assert again.startswith("# Head\n\n## first?\n\nold\n\n## second?")
    assert again.endswith(rest)
    with pytest.raises(SystemExit, match="no question has the picture 'fourth'"):
        experiments._renew(page, ["fourth"], places, tmp_path)
