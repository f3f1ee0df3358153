"""The benchmark of vLLM on a shared pool: what it asks, what it makes of the answers."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixcache_bench.speed import vllm
from prefixcache_bench.speed.vllm import KINDS, Chats, Memory, Series, VllmFailed
from prefixcache_bench.speed.vllm_engine import Steps
from prefixcache_bench.speed.vllm_peer import PYTHON_VARIABLE, Generated

NAMES = dict.fromkeys(kind for kind, _ in KINDS)


class Engine:
    """Answers as an engine would that sees what `pool` holds; its first token takes a second."""

    def __init__(self, pool: set[tuple[int, ...]], *, forgets: bool = False) -> None:
        self.pool = pool
        self.forgets = forgets
        self.asked: list[list[int]] = []

    def generate(self, prompts: list[list[int]], count: int) -> list[Generated]:
        made = []
        for prompt in prompts:
            self.asked.append(prompt)
            cached = len(prompt) - 1 if tuple(prompt) in self.pool else 0
            if not self.forgets:
                self.pool.add(tuple(prompt))
            made.append(Generated(len(prompt), cached, count, 1.0, 2.0, 3.0))
        return made


def test_each_kind_is_timed_as_often_as_there_are_rounds_and_what_is_cold_is_new() -> None:
    shared: set[tuple[int, ...]] = set()
    placed = [Engine(shared), Engine(shared)]
    copying = [Engine(shared), Engine(shared)]
    found = vllm.first_tokens(Engine(set()), placed, copying, 3, random.Random(1))  # type: ignore[arg-type]
    for row in found.values():
        assert {kind: len(series.values) for kind, series in row.items()} == dict.fromkeys(NAMES, 3)
    assert all(len(engine.asked) > 3 for engine in placed + copying)  # they change places


def test_engines_that_do_not_share_are_no_measurement() -> None:
    placed = [Engine(set()), Engine(set())]
    with pytest.raises(VllmFailed, match="no cached prefill"):
        vllm.first_tokens(Engine(set()), placed, [], 1, random.Random(1))  # type: ignore[arg-type]
    with pytest.raises(VllmFailed, match="no cached prefill"):
        vllm.first_tokens(Engine(set(), forgets=True), placed, [], 1, random.Random(1))  # type: ignore[arg-type]


def test_a_chat_never_stays_where_it_was_and_grows_from_turn_to_turn() -> None:
    script = vllm.turns(random.Random(3), chats=4, length=5)
    assert len(script) == 20
    for chat in range(4):
        mine = [turn for turn in script if turn.chat == chat]
        assert [turn.number for turn in mine] == list(range(5))
        for before, after in itertools.pairwise(mine):
            assert before.engine != after.engine
            assert after.prompt[: len(before.prompt)] == before.prompt
            assert 20 <= len(after.prompt) - len(before.prompt) <= 50
    assert len({tuple(turn.prompt[:200]) for turn in script}) == 1
    assert script == vllm.turns(random.Random(3), chats=4, length=5)


def test_a_chats_first_turn_counts_among_all_and_not_among_later_ones() -> None:
    chats = Chats()
    slow = Generated(100, 0, 2, 1.0, 6.0, 7.0)
    chats.take(slow, 0)
    chats.take(replace(slow, cached=90, first_s=1.5), 1)
    assert (chats.first_ms, chats.later_ms) == ([5000.0, 500.0], [500.0])
    assert (chats.computed, chats.prompt) == (110, 200)


def test_ratios_are_of_the_same_round() -> None:
    noisy = Series([100.0, 2.0, 3.0])
    assert vllm.ratio_of(noisy, Series([100.0, 2.0, 3.0])) == 1
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        vllm.ratio_of(noisy, Series([1.0]))


def test_the_pool_counts_once() -> None:
    status = "VmRSS:\t 900 kB\nRssAnon:\t 100 kB\nRssShmem:\t 700 kB\n"
    assert Memory.of([status] * 3, pool=7) == Memory(300 << 10, 7)


def test_a_section_is_replaced_and_its_neighbours_stay(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("# Benchmarks\n\n## Serving\n\ntext\n")
    vllm.publish(["first"], ["--seed", "1"], document)
    once = document.read_text()
    assert once.startswith(
        "# Benchmarks\n\n## Serving\n\ntext\n\n## vLLM on a shared pool\n\n```\n"
    )
    assert "$ python -m prefixcache_bench.speed.vllm --seed 1\nfirst\n```\n" in once
    document.write_text(once + "\n## After\n\nmore\n")
    vllm.publish(["second"], [], document)
    twice = document.read_text()
    assert "first" not in twice
    assert "second\n```\n\n## After\n\nmore\n" in twice
    assert twice.count(vllm.HEADING) == 1


def test_without_an_environment_it_says_how_to_make_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    assert vllm.main([]) == 1
    assert "make vllm-environment" in capsys.readouterr().err


def test_a_python_that_is_none_is_named() -> None:
    with pytest.raises(VllmFailed, match="nowhere/python does not start: No such file"):
        vllm.layout_of("nowhere/python", "model")


def test_steps_that_compute_nothing_do_not_count() -> None:
    planned = iter([3, 0, 1])

    def schedule() -> Any:
        return SimpleNamespace(total_num_scheduled_tokens=next(planned))

    scheduler = SimpleNamespace(schedule=schedule)
    steps = Steps(scheduler)
    for _ in range(3):
        scheduler.schedule()
    assert steps.told() == {"steps": 2}


def test_figures_are_written_as_json() -> None:
    found = vllm.plain({"first": {256: {"cold": Series([1.0])}}})
    assert json.loads(json.dumps(found)) == {"first": {"256": {"cold": {"values": [1.0]}}}}
