from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixcache_worker.text import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes: the hardest case for whole characters."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def stream(tokens: list[int], *stops: str, tokenizer: Any = None) -> tuple[list[str], TextStream]:
    text = TextStream(tokenizer or Bytes(), stops)
    shown = []
    for token in tokens:
        shown.append(text.push(token))
        if text.stopped:
            break
    return [*shown, text.finish()], text


def test_a_character_is_shown_when_its_last_byte_is_there() -> None:
    shown, _ = stream(list("aé€😀b".encode()))
    assert shown == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_half_a_character_at_the_end_is_shown_as_what_it_is() -> None:
    shown, text = stream(list("ab😀".encode())[:-1])
    assert shown[:2] == ["a", "b"]
    assert text.text.startswith("ab\ufffd")


def test_a_stop_string_is_never_shown_not_even_in_part() -> None:
    shown, text = stream(list(b"one ##two ###three"), "###", "xyz")
    assert "".join(shown) == text.text == "one ##two "
    assert text.stopped
    assert shown[4:6] == ["", ""]  # held back: they might become the stop string


def test_what_was_held_back_is_shown_if_no_stop_string_comes_of_it() -> None:
    shown, text = stream(list(b"one ##"), "###")
    assert shown[-1] == "##"
    assert not text.stopped


@settings(max_examples=200)
@given(
    st.text(alphabet="ab#é😀\n", max_size=30),
    st.lists(st.text(alphabet="ab#é", min_size=1, max_size=4), max_size=3),
)
def test_streamed_text_is_the_text_up_to_the_first_stop_string(text: str, stops: list[str]) -> None:
    shown, done = stream(list(text.encode()), *stops)
    ends = [text.find(stop) for stop in stops if stop in text]
    assert "".join(shown) == done.text
    if not ends:
        assert done.text == text
        return
    # The stream stops at the stop string that is complete first.
    assert done.stopped
    assert text.startswith(done.text)
    assert not any(stop in done.text for stop in stops)
    assert any(text[len(done.text) :].startswith(stop) for stop in stops)


def test_in_the_text_of_the_first_tokens_no_stop_string_is_looked_for() -> None:
    def spoken(min_tokens: int) -> tuple[str, bool]:
        made = TextStream(Bytes(), ("bb",), min_tokens)
        shown = "".join(made.push(token) for token in b"abbabbabb")
        assert shown + made.finish() == made.text
        return made.text, made.stopped

    assert spoken(0) == ("a", True)
    assert spoken(2) == ("abba", True)
    assert spoken(3) == ("abba", True)
    assert spoken(8) == ("abbabbabb", False)


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(demo_folder)


@pytest.mark.parametrize(
    "text", ["Grüße, 世界! 👩‍🚀 done.", "  two  spaces\n\n\ttab", "naïve café 123"]
)
def test_a_real_tokenizer_streams_the_text_that_it_decodes(tokenizer: Any, text: str) -> None:
    shown, _ = stream(tokenizer.encode(text), tokenizer=tokenizer)
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)
