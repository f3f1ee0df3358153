from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from experiments.conftest import SMALL
from experiments.oracle import expected
from prefixcache.errors import CacheError
from prefixcache_bench.commands.curve import curve
from prefixcache_bench.commands.generate import generate
from prefixcache_bench.commands.memory import memory
from prefixcache_bench.commands.replay import replay
from prefixcache_bench.commands.sweep import sweep
from prefixcache_bench.traces import Trace

FIELDS = {
    *("requests", "prompt_tokens", "hit_tokens", "partial_tokens", "hit_rate", "hit_rate_partial"),
    *("block_hit_rate_ceil", "evictions", "peak_blocks", "ledger"),
}


def run(command: object, *arguments: object) -> Result:
    app = typer.Typer()
    app.command()(command)  # type: ignore[type-var]
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_replay_prints_its_fixed_fields(small: Trace) -> None:
    result = run(
        replay, SMALL, "--block-size", 8, "--capacity", "1k", "--policy", "lru",
        "--partial", "off", "--json",
    )  # fmt: skip
    found = json.loads(result.stdout)
    naive = expected(small, 8, 128)
    assert found.keys() >= FIELDS
    assert found["hit_tokens"] == naive.hit_tokens
    assert found["hit_rate"] == round(naive.hit_tokens / small.prompt_tokens, 6)
    both = naive.hit_tokens + naive.partial_tokens
    assert found["hit_rate_partial"] == round(both / small.prompt_tokens, 6)
    assert found["evictions"] == naive.evictions
    assert found["ledger"]["total"] == found["prompt_tokens"]
    assert round(sum(found["ledger_percent"].values()), 3) == 100.0
    assert sum(one["total"] for one in found["windows"]) == found["prompt_tokens"]
    assert found["run"]["machine"]


def test_replay_of_hashes_takes_blocks_and_prints_prefix_rates(tmp_path: Path) -> None:
    path = tmp_path / "moon.jsonl"
    lines = [{"timestamp": t, "input_length": 1000, "hash_ids": [1, 2 + t]} for t in (0, 1, 0)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    result = run(
        replay, path, "--format", "mooncake", "--block-size", 512, "--capacity", "2b",
        "--partial", "off", "--json",
    )  # fmt: skip
    found = json.loads(result.stdout)
    assert (found["capacity_blocks"], found["peak_blocks"]) == (2, 2)
    assert found["block_prefix"] == round(2 / 6, 6)
    assert found["token_prefix"] == found["hit_rate"] == round(1024 / 3000, 6)
    assert found["broken_lines"] == 1
    assert "moon, line 4: " in result.stderr
    assert "1 broken lines left out" in result.stderr


def test_block_sizes_that_are_not_named_suit_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "moon.jsonl"
    path.write_text(json.dumps({"timestamp": 0, "input_length": 1000, "hash_ids": [1, 2]}))
    assert json.loads(run(replay, path, "--json").stdout)["block_size"] == 512
    swept = run(sweep, path, "--capacity", "inf", "-o", tmp_path / "s", "--no-picture", "--json")
    sizes = {row["block_size"] for row in json.loads(swept.stdout)["rows"]}
    assert sizes == {512, 1024, 2048, 4096}
    assert json.loads(run(replay, SMALL, "--json").stdout)["block_size"] == 16


def test_replay_shows_a_ledger_over_time_and_draws_it(tmp_path: Path) -> None:
    picture = tmp_path / "over_time"
    result = run(replay, SMALL, "--capacity", "20%", "--windows", 3, "--picture", picture)
    assert "total" in result.stdout
    assert "100.000" in result.stdout
    assert "over time" in result.stdout
    assert picture.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in picture.with_suffix(".svg").read_text()


def test_sweep_writes_table_csv_json_and_pictures_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "s"
    arguments = (SMALL, "--block-size", "1,16", "--capacity", "25%,inf", "-o", out, "-j", 1)
    result = run(sweep, *arguments)
    assert "ceiling" in result.stdout
    assert re.search(
        r"how large a block .*\n.* 25% +inf\n +lru, partial off +1 +1\n", result.stdout
    )
    report = json.loads(out.with_suffix(".json").read_text())
    assert len(report["rows"]) == 2 * 2 * 2
    assert report["run"]["command"]
    assert set(report["ceilings"]["infinite_memory"]) == {"1", "16"}
    text = out.with_suffix(".csv").read_text()
    assert text.startswith("# command: ")
    rows = list(csv.DictReader(line for line in text.splitlines() if line[0] != "#"))
    assert len(rows) == 8
    assert out.with_suffix(".png").exists()
    assert out.with_suffix(".svg").exists()
    more = run(sweep, *arguments, "--resume", "--partial", "off,blocks,tails", "--json")
    assert len(json.loads(more.stdout)["rows"]) == 12


def test_an_interrupted_sweep_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefixcache_bench.sweep.sweep", interrupted)
    result = run(sweep, SMALL, "-o", tmp_path / "s")
    assert result.exit_code == 130
    assert "0 of 50 rows are finished; --resume goes on" in result.stderr


def test_curve_marks_the_knee_and_the_bytes(tmp_path: Path) -> None:
    out = tmp_path / "c"
    result = run(
        curve, SMALL, "--block-size", "8,32", "--layout", "smollm2-135m", "--capacity",
        "100b,50%", "-o", out, "--json",
    )  # fmt: skip
    found = json.loads(result.stdout)
    marks = {one["mark"]: one for one in found["curves"][0]["marks"]}
    assert {"knee", "100b", "50%", "100% of the ceiling"} <= marks.keys()
    assert marks["100b"]["capacity_bytes"] == 800 * 23040
    assert out.with_suffix(".csv").read_text().startswith("# command: ")
    assert out.with_suffix(".svg").exists()
    shown = run(curve, SMALL, "--layout", "2x1x8:float32").stdout
    assert "knee" in shown
    assert "KiB" in shown


def test_memory_shows_shares_beside_the_published_ones(tmp_path: Path) -> None:
    arguments = (SMALL, "--slots", 2048, "--longest", 256, "--branched", 3, "--block-size", "1,16")
    shown = run(memory, *arguments, "--picture", tmp_path / "m").stdout
    assert "reserve-power-of-two" in shown
    assert "96.3" in shown
    found = json.loads(run(memory, *arguments, "--json").stdout)
    for row in found["shares"]:
        parts = [row[f"{one}_percent"] for one in ("useful", "reserved", "internal", "external")]
        assert sum(parts) == pytest.approx(100, abs=0.03)
    assert len(found["savings"]) == 6


def test_a_generated_trace_can_be_replayed(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    run(generate, "agents", "--count", 5, "-o", path, "--packed")
    assert "agents" not in run(replay, path).stdout
    piped = run(generate, "rag", "--count", 2, "--question-tokens", 3)
    assert len(piped.stdout.splitlines()) == 2
    assert json.loads(piped.stdout.splitlines()[0])["prompt"] > 0


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (replay, ["nowhere"], "no file or folder"),
        (replay, [SMALL, "--partial", "half"], "off, blocks or tails"),
        (replay, [SMALL, "--format", "xml"], "no format 'xml'; there are"),
        (replay, [SMALL, "--system", "five"], "none, one, four"),
        (replay, [SMALL, "--policy", "best"], "no eviction policy 'best'; there are"),
        (replay, [SMALL, "--capacity", "much"], "cannot read the capacity"),
        (sweep, [SMALL, "--block-size", "16,big"], "not a list of block sizes"),
        (sweep, [SMALL, "--capacity", "4", "--block-size", "16"], "does not hold one block"),
        (curve, [SMALL, "--layout", "gpt-99"], "no layout 'gpt-99'; .*llama-3.1-8b"),
        (generate, ["novels"], "no workload 'novels'; there are: chats"),
        (generate, ["chats", "--arrival", "late"], "poisson, uniform, bursts"),
        (memory, [SMALL, "--longest", "1"], "does not tell the lengths"),
    ],
)
def test_what_a_user_can_get_wrong_is_said_in_one_line(
    command: object, arguments: list[object], message: str
) -> None:
    with pytest.raises(CacheError, match=message):
        run(command, *arguments)


@pytest.mark.parametrize("name", ["sweep", "replay", "curve", "generate", "memory"])
def test_help_needs_neither_torch_nor_matplotlib_nor_numpy(name: str) -> None:
    program = (
        f"import sys; from prefixcache_bench.commands import {name}; "
        "print(sorted({'torch', 'matplotlib', 'numpy', 'grpc', 'tiktoken'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.strip() == "[]"
