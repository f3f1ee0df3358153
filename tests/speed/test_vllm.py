"""The benchmark of vLLM on a shared pool: what it asks, what it makes of the answers."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from prefixcache_bench.speed import vllm, vllm_chats, vllm_engine, vllm_fleet
from prefixcache_bench.speed.vllm_chats import Chats
from prefixcache_bench.speed.vllm_engine import Steps
from prefixcache_bench.speed.vllm_figures import Say, Series, ratio_of
from prefixcache_bench.speed.vllm_fleet import Fleet, Memory
from prefixcache_bench.speed.vllm_peer import PYTHON_VARIABLE, Generated, VllmFailed

NAMES = (
    *("alone, cold", "alone, its own", "in place, cold", "in place, its own"),
    *("in place, another's", "connector, cold", "connector, its own", "connector, another's"),
)


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


def time_first_tokens(placed: list[Engine], rounds: int) -> dict[int, dict[str, Series]]:
    pool: set[tuple[int, ...]] = set()
    engines: Any = (Engine(set()), {"in place": placed, "connector": [Engine(pool), Engine(pool)]})
    return vllm.first_tokens(*engines, rounds, random.Random(1), Say())


def test_each_kind_is_timed_as_often_as_there_are_rounds_and_what_is_cold_is_new() -> None:
    shared: set[tuple[int, ...]] = set()
    placed = [Engine(shared), Engine(shared)]
    found = time_first_tokens(placed, 3)
    for row in found.values():
        assert {kind: len(series.values) for kind, series in row.items()} == dict.fromkeys(NAMES, 3)
    assert all(len(engine.asked) > 3 for engine in placed)  # they change places


def test_each_engine_was_asked_all_before_anything_counts() -> None:
    asked: list[tuple[str, int]] = []

    class Named(Engine):
        def generate(self, prompts: list[list[int]], count: int) -> list[Generated]:
            seen = tuple(prompts[0]) in self.pool
            asked.append((f"{id(self)}{'warm' if seen else 'cold'}", len(prompts[0])))
            return super().generate(prompts, count)

    shared: set[tuple[int, ...]] = set()
    placed: list[Engine] = [Named(shared), Named(shared)]
    time_first_tokens(placed, 0)
    assert {what for what, _ in asked} == {
        f"{id(one)}{how}" for one in placed for how in ("warm", "cold")
    }


def test_engines_that_do_not_share_are_no_measurement() -> None:
    with pytest.raises(VllmFailed, match="no cached prefill"):
        time_first_tokens([Engine(set()), Engine(set())], 1)
    with pytest.raises(VllmFailed, match="no cached prefill"):
        time_first_tokens([Engine(set(), forgets=True), Engine(set())], 1)


def test_what_is_cached_is_a_part_of_what_is_cold_of_its_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {256: {name: Series([8.0]) for name in NAMES}}
    found[256]["in place, another's"] = Series([2.0])
    found[256]["in place, cold"] = Series([16.0])
    vllm.say_first_tokens(found, ["in place", "connector"], Say())
    lines = {
        line[:24].strip(): line.split()[-1] for line in capsys.readouterr().out.splitlines() if line
    }
    assert {lines[name] for name in NAMES if not name.startswith("in place")} == {"1.000"}
    assert (lines["in place, another's"], lines["in place, cold"]) == ("0.125", "2.000")


def test_a_library_that_answers_every_name_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        __slots__ = ()

        def __getattr__(self, name: str) -> str:
            return f"function {name}"

    ffi: Any = ModuleType("llvmlite.binding.ffi")
    ffi._lib_wrapper = Library
    for name, module in (
        ("llvmlite", ModuleType("llvmlite")),
        ("llvmlite.binding", ModuleType("llvmlite.binding")),
        ("llvmlite.binding.ffi", ffi),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    library = Library()
    assert hasattr(library, "__dict__")
    vllm_engine.hide_kernels()
    assert not hasattr(library, "__dict__")
    assert library.add == "function add"


def test_decoding_that_waits_for_its_prompt_is_no_measurement() -> None:
    forgetful: Any = Engine(set(), forgets=True)
    good: Any = Engine(set())
    found = vllm.decoding(good, Engine(set()), 2, 5, random.Random(1), Say())  # type: ignore[arg-type]
    assert {batch: len(row["alone"].values) for batch, row in found.items()} == {1: 2, 8: 2, 16: 2}
    assert found[8]["in place"].median == 8 * found[1]["in place"].median
    with pytest.raises(VllmFailed, match="no cached prefill"):
        vllm.decoding(good, forgetful, 1, 5, random.Random(1), Say())


def test_a_chat_never_stays_where_it_was_and_grows_from_turn_to_turn() -> None:
    script = vllm_chats.turns(random.Random(3), chats=4, length=5, engines=3)
    assert len(script) == 20
    for chat in range(4):
        mine = [turn for turn in script if turn.chat == chat]
        assert [turn.number for turn in mine] == list(range(5))
        for before, after in itertools.pairwise(mine):
            assert before.engine != after.engine
            assert after.prompt[: len(before.prompt)] == before.prompt
            assert 20 <= len(after.prompt) - len(before.prompt) <= 50
    assert len({tuple(turn.prompt[:200]) for turn in script}) == 1
    assert script == vllm_chats.turns(random.Random(3), chats=4, length=5, engines=3)


def test_a_chats_first_turn_counts_among_all_and_not_among_later_ones() -> None:
    chats = Chats()
    slow = Generated(100, 0, 2, 1.0, 6.0, 7.0)
    chats.take(slow, 0)
    chats.take(replace(slow, cached=90, first_s=1.5), 1)
    assert (chats.first_ms, chats.later_ms) == ([5000.0, 500.0], [500.0])
    assert (chats.computed, chats.prompt) == (110, 200)


def test_ratios_are_of_the_same_round() -> None:
    noisy = Series([100.0, 2.0, 3.0])
    assert ratio_of(noisy, Series([100.0, 2.0, 3.0])) == 1
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratio_of(noisy, Series([1.0]))


def test_a_page_that_three_map_counts_once() -> None:
    each = "Rss:\t 900 kB\nPss_Anon:\t 100 kB\nPss_File:\t 9 kB\nPss_Shmem:\t 200 kB\n"
    assert Memory.of([each] * 3) == Memory(own=300 << 10, shared=600 << 10)


def chats_of(computed: Engine, *, quick: bool = True) -> dict[str, Chats]:
    systems: Any = {"in place": [computed] * 3, "private caches": [Engine(set()) for _ in range(3)]}
    return vllm.play_and_say(systems, SimpleNamespace(quick=quick, seed=0), Say())  # type: ignore[arg-type]


def test_all_systems_play_the_same_chats_after_a_warm_up_that_counts_for_none() -> None:
    engine = Engine(set())
    found = chats_of(engine)
    assert {name: len(chats.first_ms) for name, chats in found.items()} == dict.fromkeys(found, 9)
    assert {name: len(chats.later_ms) for name, chats in found.items()} == dict.fromkeys(found, 6)
    assert len({chats.prompt for chats in found.values()}) == 1
    assert len(engine.asked) == 9 + 3 * 4


def test_a_goal_is_met_or_missed_only_where_one_was_set() -> None:
    shared: set[tuple[int, ...]] = set()
    systems: Any = {name: [Engine(shared)] * 3 for name in ("in place", "a peer")}
    options: Any = SimpleNamespace(quick=True, seed=0)
    for goal, judged, line in (
        (0.25, 1, "goal MISSED: p99 in place of a peer 1.000 (at most 0.25)"),
        (None, 0, "p99 in place of a peer: 1.000"),
    ):
        say = Say()
        vllm.play_and_say(systems, options, say, goal=goal)
        assert say.lines[-1] == line
        assert say.met + say.missed == judged


def test_a_section_is_replaced_and_its_neighbours_stay(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("# Benchmarks\n\n## Serving\n\ntext\n")
    vllm.publish("Some part", ["first"], "python -m some --seed 1", document)
    once = document.read_text()
    assert once.startswith("# Benchmarks\n\n## Serving\n\ntext\n\n## Some part\n\n```\n")
    assert "$ python -m some --seed 1\nfirst\n```\n" in once
    document.write_text(once + "\n## After\n\nmore\n")
    vllm.publish("Some part", ["second"], "python -m some", document)
    twice = document.read_text()
    assert "first" not in twice
    assert "second\n```\n\n## After\n\nmore\n" in twice
    assert twice.count("## Some part") == 1


def test_without_an_environment_it_says_how_to_make_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    assert vllm.main([]) == 1
    assert "make vllm-environment" in capsys.readouterr().err


def test_a_python_that_is_none_is_named() -> None:
    with pytest.raises(VllmFailed, match="nowhere/python does not start: No such file"):
        vllm_fleet.layout_of("nowhere/python", "model")


class Parts:
    """Parts for show, of which one ends as told; `made` are the fleets that they got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
        self.left: list[str] = []
        self.error = error
        parts = {name: (f"Part {name}", self.part(name)) for name in ("one", "two", "three")}
        monkeypatch.setattr(vllm, "PARTS", parts)
        monkeypatch.setattr(vllm, "layout_of", lambda *_: "pages:1x1:show")
        monkeypatch.setattr(vllm, "fleet", self.fleet)

    def part(self, name: str) -> Any:
        def run(made: Fleet, options: Any, say: Say) -> dict[str, Any]:
            say.goal(f"{name} of it", 1.0, 2.0)
            if name == "two" and self.error is not None:
                raise self.error
            return {"figures": Series([1.0])}

        return run

    @contextlib.contextmanager
    def fleet(self, *_: Any, **__: Any) -> Iterator[Any]:
        yield SimpleNamespace(left=lambda: self.left)


@pytest.mark.parametrize(
    "error", [VllmFailed("it broke"), ZeroDivisionError("it broke"), SystemExit("it broke")]
)
def test_a_part_that_fails_is_told_and_loses_no_other(
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    Parts(monkeypatch, error)
    document, figures = tmp_path / "benchmarks.md", tmp_path / "figures.json"
    document.write_text("# Benchmarks\n\n## Part two\n\nbefore\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm, "DOCUMENT", document)
    assert vllm.main(["--python", "python", "--json", str(figures), "--publish"]) == 1
    said = capsys.readouterr().out
    assert "FAILED: two: it broke" in said
    assert said.endswith("2 of 3 parts measured; goals: 3 met, 0 missed; FAILED: two\n")
    found = json.loads(figures.read_text())["parts"]
    assert found["one"] == found["three"] == {"figures": {"values": [1.0]}}
    assert found["two"] == {"failed": "it broke"}
    published = document.read_text()
    assert "## Part two\n\nbefore\n" in published
    assert "goal met: three of it" in published


def test_only_the_parts_that_are_named_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Parts(monkeypatch, None)
    assert vllm.main(["--python", "python", "--only", "three", "--only", "one"]) == 0
    said = capsys.readouterr().out
    assert "two of it" not in said
    assert said.endswith("2 of 2 parts measured; goals: 2 met, 0 missed\n")


def test_what_a_part_leaves_in_the_pool_fails_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Parts(monkeypatch, None).left = ["3 leases, not 0"]
    assert vllm.main(["--python", "python", "--only", "one"]) == 1
    assert "FAILED: one: left in the pool: 3 leases, not 0" in capsys.readouterr().out


def test_steps_that_compute_nothing_do_not_count() -> None:
    planned = iter([3, 0, 1])

    def schedule() -> Any:
        return SimpleNamespace(total_num_scheduled_tokens=next(planned))

    scheduler = SimpleNamespace(schedule=schedule, _preempt_request=lambda request: request)
    steps = Steps(scheduler)
    for _ in range(3):
        scheduler.schedule()
    assert scheduler._preempt_request("one") == "one"
    assert steps.told() == {"steps": 2, "preempted": 1}
    pool = SimpleNamespace(cached_block_hash_to_block={"a block": 1})
    scheduler.kv_cache_manager = SimpleNamespace(block_pool=pool)
    assert steps.told() == {"steps": 2, "preempted": 1, "kv_blocks": 1}


def test_figures_are_written_as_json() -> None:
    found = vllm.plain({"first": {256: {"cold": Series([1.0])}}})
    assert json.loads(json.dumps(found)) == {"first": {"256": {"cold": {"values": [1.0]}}}}
