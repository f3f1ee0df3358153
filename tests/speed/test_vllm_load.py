"""Loading vLLM engines: what programs said of their requests, and how they are asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixcache_bench.speed import vllm_load
from prefixcache_bench.speed.vllm_load import REQUESTS, Tally, Told
from prefixcache_bench.speed.vllm_peer import VllmFailed


def guidellm(**totals: int) -> dict[str, Any]:
    metrics = {
        "request_totals": totals | {"total": sum(totals.values())},
        "output_token_count": {"successful": {"total_sum": 96.0}},
    }
    return {"benchmarks": [{"metrics": metrics}]}


def test_what_guidellm_did_not_wait_for_failed() -> None:
    told = Told.by_guidellm(guidellm(successful=12, errored=1, incomplete=2))
    assert told == Told(completed=12, failed=3, tokens=96)


def test_why_a_request_failed_is_told_with_the_number() -> None:
    written = guidellm(successful=63, errored=1, incomplete=0)
    written["benchmarks"][0]["requests"] = {
        "successful": [],
        "errored": [{"info": {"error": "Server disconnected"}}],
        "incomplete": None,
    }
    tally = Tally()
    tally.take(Told.by_guidellm(written))
    assert tally.wrong("guidellm") == [
        "guidellm: 1 failed and 63 were answered of 64 requests; errored: Server disconnected"
    ]


@pytest.mark.parametrize(("completed", "failed"), [(REQUESTS - 1, 1), (REQUESTS - 1, 0), (0, 0)])
def test_a_request_that_was_not_answered_is_wrong(completed: int, failed: int) -> None:
    tally = Tally()
    tally.take(Told(REQUESTS, 0, 9))
    assert tally.wrong("program") == []
    tally.take(Told(completed, failed, 9))
    assert len(tally.wrong("program")) == 1


def writes(what: Any, code: int = 0) -> list[str]:
    words = f"import sys; open(sys.argv[1], 'w').write({json.dumps(what)!r}); print('said')"
    return [sys.executable, "-c", f"{words}; sys.exit({code})"]


def test_a_turn_gives_what_each_program_wrote(tmp_path: Path) -> None:
    results = [tmp_path / f"{number}.json" for number in range(2)]
    commands = {
        result: [*writes({"number": number}), str(result)] for number, result in enumerate(results)
    }
    assert vllm_load.turn(commands, "python") == [{"number": 0}, {"number": 1}]


def test_a_program_that_fails_or_hangs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "0.json"
    with pytest.raises(VllmFailed, match="ended with 3: said"):
        vllm_load.turn({result: [*writes({}, 3), str(result)]}, "python")
    monkeypatch.setattr(vllm_load, "TURN_S", 0.0)
    with pytest.raises(VllmFailed, match="ended with -9"):
        vllm_load.turn({result: [sys.executable, "-c", "import time; time.sleep(999)"]}, "python")


def test_engines_are_asked_the_same_in_a_turn_and_other_things_in_the_next(tmp_path: Path) -> None:
    options: Any = SimpleNamespace(python="python", guidellm="guidellm", concurrency=8, seed=5)

    def asked(name: str, number: int) -> list[list[str]]:
        made = vllm_load.commands(options, name, ["one", "two"], "model", number, tmp_path)
        assert len(made) == 2
        return list(made.values())

    for name, program in (("vllm bench serve", "python"), ("guidellm", "guidellm")):
        first, second = asked(name, 0)
        assert first[0] == second[0] == program
        differing = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
        assert [a.replace("one", "two").replace("-0.", "-1.") for a, _ in differing] == [
            b for _, b in differing
        ]
        renamed = [[word.replace("turn-0-", "turn-1-") for word in one] for one in (first, second)]
        assert all(mine != its for mine, its in zip(asked(name, 1), renamed, strict=True))
