"""vLLM beside the engine: what it counted decides what was measured; its figures come from it."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixcache_bench.speed import serving, vllm_peer
from prefixcache_bench.speed.vllm_engine import told
from prefixcache_bench.speed.vllm_peer import (
    ABSENT,
    Generated,
    VllmFailed,
    cold,
    decode_tokens_per_s,
    warm,
)


def recorded(cached: int, **times: float) -> Any:
    """What vLLM 0.32.0 gave for five tokens after a prompt of 300, as far as it is read."""
    clock = {
        "arrival_time": 1795944869.6351871,
        "queued_ts": 10554.420547241,
        "scheduled_ts": 10554.420583565,
        "first_token_ts": 10554.611444902,
        "last_token_ts": 10554.682609073,
    }
    return SimpleNamespace(
        prompt_token_ids=list(range(1000, 1300)),
        num_cached_tokens=cached,
        metrics=SimpleNamespace(num_generation_tokens=5, **clock | times),
        outputs=[SimpleNamespace(token_ids=[5, 6, 7, 8, 9], finish_reason="length")],
    )


COLD = Generated.read(told(recorded(0)))
WARM = Generated.read(told(recorded(288)))


def test_a_request_is_timed_by_the_clock_of_the_engine_and_decoding_from_its_own_first_token() -> (
    None
):
    assert COLD.first_token_s == pytest.approx(0.190897661)
    assert COLD.tokens_per_s == pytest.approx(4 / 0.071164171)
    assert decode_tokens_per_s([COLD, COLD, COLD]) == pytest.approx(3 * COLD.tokens_per_s)


def test_a_slow_first_run_of_a_batch_does_not_touch_the_rate_of_the_next() -> None:
    """A cold prefill that takes ten times the whole of the second run: no rate below zero."""
    slow = replace(COLD, queued_s=COLD.queued_s - 10)
    assert slow.first_token_s > 10
    assert decode_tokens_per_s([slow]) == decode_tokens_per_s([COLD]) > 0


def test_the_engines_own_count_tells_a_cold_prefill_from_a_cached_one() -> None:
    assert cold(COLD) is COLD
    assert warm(WARM, 300) is WARM
    with pytest.raises(VllmFailed, match="288 from its cache, so this is no cold prefill"):
        cold(WARM)
    with pytest.raises(VllmFailed, match="took 0 from its cache, not 288, so this is no cached"):
        warm(COLD, 300)


def test_a_whole_block_less_than_was_seen_is_not_warm() -> None:
    assert warm(replace(WARM, cached=256), 284)
    with pytest.raises(VllmFailed, match="256 from its cache, not 288"):
        warm(replace(WARM, cached=256), 288)
    with pytest.raises(VllmFailed, match="no cached prefill"):
        warm(replace(WARM, cached=0), 31)  # no block of it can have been cached


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ({"last_token_ts": 10554.5}, "do not follow each other"),
        ({"first_token_ts": 0.0}, "do not follow each other"),
        ({"queued_ts": 0.0}, "do not follow each other"),
    ],
)
def test_times_that_run_backwards_are_no_measurement(times: dict[str, float], says: str) -> None:
    with pytest.raises(VllmFailed, match=says):
        Generated.read(told(recorded(0, **times)))


def test_what_vllm_does_not_tell_is_named() -> None:
    output = recorded(0)
    output.metrics = output.num_cached_tokens = None
    with pytest.raises(VllmFailed, match="nothing of: cached, queued_s, first_s, last_s"):
        Generated.read(told(output))


def test_one_token_has_no_rate() -> None:
    with pytest.raises(VllmFailed, match="decoding cannot be timed: 1 tokens"):
        _ = replace(COLD, generated=1, last_s=COLD.first_s).tokens_per_s


def ask(python: str) -> None:
    with vllm_peer.vllm(python, "model", "bfloat16", 1) as peer:
        peer.generate([[1, 2]], 1)


def stand_in(folder: Path, *lines: str) -> str:
    """A Python with a vLLM that answers these lines, whatever it is asked."""
    path = folder / "python"
    said = "".join(f"print({line!r}, flush=True)\n" for line in lines)
    path.write_text(
        f"#!{sys.executable}\nimport sys\n{said}print('the last words', file=sys.stderr)\n"
    )
    path.chmod(0o700)
    return os.fspath(path)


ABOUT = '{"version": "0.32.0", "torch": "2.13.0", "threads": 1, "compiled": true, "block_size": 32}'


def test_a_vllm_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(VllmFailed, match="nowhere/python does not start: No such file"):
        ask(f"{tmp_path}/nowhere/python")
    with pytest.raises(VllmFailed, match="exit code 0: the last words"):
        ask(stand_in(tmp_path))


def test_a_python_without_vllm_says_so(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o700)
    with pytest.raises(VllmFailed, match=r"exit code 1: .*No module named 'vllm'"):
        ask(os.fspath(bare))


def test_a_vllm_that_ends_or_answers_another_question_is_told_from_a_measurement(
    tmp_path: Path,
) -> None:
    with pytest.raises(VllmFailed, match="exit code 0: the last words"):
        ask(stand_in(tmp_path, ABOUT))
    with pytest.raises(VllmFailed, match="runs 2 threads, not 1"):
        ask(stand_in(tmp_path, ABOUT.replace('"threads": 1', '"threads": 2')))
    other = '[{"prompt": 2, "cached": 0, "generated": 3, "queued_s": 1, "first_s": 2, "last_s": 3}]'
    with pytest.raises(VllmFailed, match=r"asked for 1 tokens after prompts of \[2\] tokens"):
        ask(stand_in(tmp_path, ABOUT, other))


def test_asking_for_vllm_alone_without_its_python_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(vllm_peer.PYTHON_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as ended:
        serving.main(["--only", "vllm"])
    assert ended.value.code == 2
    assert ABSENT in capsys.readouterr().err


def test_what_was_not_measured_is_named_in_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    serving.report({"goals": [], "vllm": {"failed": ABSENT}})
    assert (
        "vLLM: not measured: neither --vllm nor $PREFIXCACHE_VLLM_PYTHON" in capsys.readouterr().out
    )
