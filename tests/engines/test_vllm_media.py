"""vLLM with a model that hears, on one pool: text is shared by all, a sound by who plays the same.

Runs where an environment with vLLM is named: `PREFIXCACHE_VLLM_PYTHON=.venv-vllm/bin/python`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.test_vllm import MODES, Stage, text
from engines.vllm_engine import SOUND
from engines.vllm_process import needs_vllm, write_model

pytestmark = needs_vllm

LENGTH = 25
"""Tokens of a second's sound."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("v")
    write_model(folder / "model", hears=True)
    made = Stage(folder, MODES, each=1)
    try:
        made.wait()
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_sound_is_read_by_who_plays_the_same_and_the_text_before_it_by_all(
    stage: Stage, mode: str
) -> None:
    (other,) = {*MODES} - {mode}
    first, second = stage.engines[f"{mode} 1"], stage.engines[f"{other} 1"]
    system, question = text((mode, "system"), 103), text((mode, "question"), 72)
    prompt = [*system, SOUND, *question]
    whole = 103 + LENGTH + 72
    answers = {}
    # What a connector stores is whole blocks, so that the last one of 32 is computed again.
    exact = mode.startswith("in-place")
    known = {0: (0, whole - 1 if exact else 192), 1: (103, whole - 1 if exact else 192)}
    for at, number in enumerate((5, 9)):
        told = {"prompts": [prompt], "max_tokens": 12, "sounds": [number]}
        want = stage.alone.ask(**told)["tokens"]
        before, after = known[at]
        found = first.ask(**told)
        assert found["tokens"] == want
        if exact:
            assert found["cached"] == [before]
        assert second.ask(**told) == {"tokens": want, "cached": [after]}
        answers[number] = tuple(want[0])
    assert len(set(answers.values())) == 2, "nothing is heard: the test says nothing"
    stage.check_idle()


def test_two_sounds_in_one_prompt_are_two(stage: Stage) -> None:
    engines = [stage.engines[f"{mode} 1"] for mode in MODES]
    prompt = [*text("two", 40), SOUND, *text("between", 33), SOUND, *text("after", 20)]
    for sounds in ([5, 9], [9, 5], [5, 5]):
        told = {"prompts": [prompt], "max_tokens": 12, "sounds": sounds}
        want = stage.alone.ask(**told)["tokens"]
        assert [engine.ask(**told)["tokens"] for engine in engines] == [want, want]
    stage.check_idle()
