"""vLLM with LoRA adapters on one pool: each adapter's keys and values are its own.

Runs where an environment with vLLM is named: `PREFIXCACHE_VLLM_PYTHON=.venv-vllm/bin/python`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.test_vllm import Stage, text
from engines.vllm_process import needs_vllm, write_model

pytestmark = needs_vllm

MODES = ("connector+lora", "in-place+lora")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("v")
    write_model(folder / "model")
    made = Stage(folder, MODES, alone="alone+lora", each=1)
    try:
        made.wait()
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("mode", MODES)
def test_what_an_adapter_computed_is_read_by_that_adapter_alone(stage: Stage, mode: str) -> None:
    (other,) = {*MODES} - {mode}
    first, second = stage.engines[f"{mode} 1"], stage.engines[f"{other} 1"]
    known = 299 if mode.startswith("in-place") else 288  # a connector stores whole blocks
    prompt = text((mode, "adapters"), 300)
    told = {"prompts": [prompt], "max_tokens": 12}
    answers = {}
    for adapter in ("tone", "voice", ""):
        want = stage.alone.ask(**told, adapter=adapter)["tokens"]
        assert first.ask(**told, adapter=adapter) == {"tokens": want, "cached": [0]}
        assert second.ask(**told, adapter=adapter) == {"tokens": want, "cached": [known]}
        answers[adapter] = tuple(want[0])
    assert len(set(answers.values())) == 3, "the adapters change nothing: the test says nothing"
    stage.check_idle()
