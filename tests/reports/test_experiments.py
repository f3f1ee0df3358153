from __future__ import annotations

from pathlib import Path

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
