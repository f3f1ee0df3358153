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
from prefixcache_bench.experiments.traces import Trace

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
    assert "1 of 4 lines left out (25.0%)" in result.stderr


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


@pytest.mark.parametrize("tokens", [1, 5, 19, 100, 2000])
@pytest.mark.parametrize("given", [(), ("--block-size", "4,16"), ("--capacity", "3,inf")])
def test_what_a_sweep_does_by_itself_suits_a_small_trace(
    tmp_path: Path, tokens: int, given: tuple[str, ...]
) -> None:
    path = tmp_path / "small.jsonl"
    path.write_text(json.dumps(list(range(tokens))) + "\n" + json.dumps([1, 2, 3]) + "\n")
    result = run(sweep, path, "-o", tmp_path / "s", "-j", 1, "--no-picture", "--json", *given)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    sizes, capacities = ({row[name] for row in rows} for name in ("block_size", "capacity"))
    if given[:1] == ("--block-size",):
        assert sizes == {4, 16}
    if given[:1] == ("--capacity",):
        assert capacities == {"3", "inf"}
    if tokens == 2000 and not given:
        assert capacities == {"5%", "10%", "25%", "50%", "inf"}
        assert sizes == {1, 4, 16, 64}
        assert "blocks of 256 is left out" in result.stderr
    assert "inf" in capacities


def test_an_interrupted_sweep_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefixcache_bench.experiments.sweep.sweep", interrupted)
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
        (memory, [SMALL, "--longest", "1"], "no request of at most 1 tokens; the shortest has 9"),
        (replay, [SMALL, "--capacity", "0"], "capacity of '0' holds nothing; inf is infinite"),
        (sweep, [SMALL, "--capacity", "25%,0"], "capacity of '0' holds nothing"),
        (sweep, [SMALL, "--capacity", ","], "names no capacity"),
        (replay, [SMALL, "--capacity", "2GiB"], "2GiB is in bytes; say with --layout"),
        (replay, [SMALL, "--hash-block", "64"], "--hash-block is for traces of block hashes"),
        (replay, [SMALL, "--rate", "2"], "--rate and --think are for chats"),
        (replay, [SMALL, "--tokenizer", "nosuch"], "--tokenizer is for chats; .* form jsonl"),
        (replay, [SMALL, "--name", "x"], "--name and --system are for kvtrace files; .* jsonl"),
        (replay, [SMALL, "--system", "one"], "--name and --system are for kvtrace files"),
        (
            memory,
            [SMALL, "--slots", "64"],
            "64 slots do not hold the 2,048 .* --longest 2,048; the",
        ),
        (
            memory,
            [SMALL, "--slots", "64", "--longest", "64", "--block-size", "16,128"],
            "64 slots hold no block of 128",
        ),
        (memory, [SMALL, "--slots", "1048576"], "never fill 1,048,576 slots .*; use --slots "),
    ],
)
def test_what_a_user_can_get_wrong_is_said_in_one_line(
    command: object, arguments: list[object], message: str
) -> None:
    with pytest.raises(CacheError, match=message):
        run(command, *arguments)


def moon(path: Path, *lines: dict[str, object]) -> Path:
    full = [{"timestamp": n, "input_length": 1000} | line for n, line in enumerate(lines)]
    path.write_text("".join(json.dumps(line) + "\n" for line in full))
    return path


def test_what_is_left_out_stands_beside_the_figure_and_most_of_a_file_decides_the_exit_code(
    tmp_path: Path,
) -> None:
    good, bad = {"hash_ids": [1, 2]}, {"hash_ids": None}
    half = run(replay, moon(tmp_path / "half.jsonl", good, bad))
    assert half.stdout.startswith(
        "half: 1 request, 1,000 prompt tokens; 1 of 2 lines left out (50.0%)"
    )
    assert half.exit_code == 0
    most = moon(tmp_path / "most.jsonl", good, bad, bad)
    swept = (sweep, "--capacity", "inf", "--no-picture", "-o", tmp_path / "s")
    for command, *more in ((replay,), (curve,), swept):
        result = run(command, most, *more)
        assert result.exit_code == 1
        assert "2 of 3 lines left out (66.7%)" in result.stdout
        assert "more than 50% of the file is left out" in result.stderr
    assert json.loads(run(replay, most, "--json").stdout)["left_out"] == round(2 / 3, 6)


def test_capacities_in_bytes_are_those_of_a_model(tmp_path: Path) -> None:
    out = tmp_path / "s"
    asked = (SMALL, "--layout", "2x1x8:float32", "--capacity", "16KiB,inf", "--block-size", "8,16")
    result = run(sweep, *asked, "--partial", "tails", "-o", out, "--no-picture")
    assert "memory, for 2x1x8:float32: 16KiB = 16 KiB" in result.stdout
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert {row["capacity_tokens"] for row in rows} == {16 * 1024 // 128, None}
    one = json.loads(run(replay, *asked[:3], "--capacity", "16KiB", "--json").stdout)
    assert (one["capacity_tokens"], one["capacity_bytes"]) == (128, 16384)


def test_nothing_is_overwritten_unless_told(tmp_path: Path) -> None:
    commands = {
        "s.csv": (sweep, SMALL, "--capacity", "inf", "--no-picture", "-o", tmp_path / "s"),
        "c.csv": (curve, SMALL, "-o", tmp_path / "c"),
        "g.jsonl": (generate, "tree", "--count", 1, "-o", tmp_path / "g.jsonl"),
    }
    for nameless in ("", "/"):
        for command in (sweep, curve):
            with pytest.raises(CacheError, match="is the name of no file"):
                run(command, SMALL, "-o", nameless)
    with pytest.raises(CacheError, match=r"cannot write there: .*too long"):
        run(generate, "tree", "--count", 1, "-o", tmp_path / ("x" * 300))
    for name, (command, *arguments) in commands.items():
        (tmp_path / name).write_text("precious")
        with pytest.raises(CacheError, match=f"{name}: there already; --force overwrites"):
            run(command, *arguments)
        assert (tmp_path / name).read_text() == "precious"
        run(command, *arguments, "--force")
        assert (tmp_path / name).read_text() != "precious"


def test_no_folder_is_made_by_a_misspelt_name(tmp_path: Path) -> None:
    nowhere = tmp_path / "no" / "such"
    for command, *arguments in (
        (sweep, SMALL, "--capacity", "inf", "-o", nowhere / "s"),
        (curve, SMALL, "-o", nowhere / "c"),
        (replay, SMALL, "--picture", nowhere / "r"),
        (generate, "tree", "--count", 1, "-o", nowhere / "g.jsonl"),
    ):
        with pytest.raises(CacheError, match=f"there is no folder {nowhere} to write into"):
            run(command, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_is_refused_by_name() -> None:
    with pytest.raises(CacheError, match="cannot write the picture /proc/x"):
        run(replay, SMALL, "--picture", "/proc/x")


def test_nothing_is_a_number_that_was_given(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="block size 0 is not a power of two"):
        run(replay, SMALL, "--block-size", 0)
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": [1, 2]}\n{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(CacheError, match=r"--rate 0\.0 .* are more than 0"):
        run(replay, chats, "--rate", 0)


def test_without_matplotlib_the_figures_are_there_and_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command, name in ((sweep, "s"), (curve, "c")):
        result = run(command, SMALL, "--capacity", "inf", "-o", tmp_path / name)
        assert result.exit_code == 0
        assert "no picture: drawing a picture needs matplotlib" in result.stderr
        assert "chats: " in result.stdout
        assert (tmp_path / f"{name}.csv").exists()


def test_made_up_times_are_said_and_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text("".join(json.dumps({"messages": turn * 2}) + "\n" for _ in range(3)))
    assert (
        "6 of 6 requests have no time of their own: 1 chat begins a second"
        in run(replay, path).stderr
    )
    slow = json.loads(run(replay, path, "--rate", 0.01, "--think", 0, "--json").stdout)
    assert slow["notes"][0].startswith("6 of 6 requests have no time of their own: 0.01 chats")
    assert slow["windows"][-1]["start_s"] > 180


def test_memory_reads_the_lengths_of_answers_of_block_hashes(tmp_path: Path) -> None:
    lines = [{"hash_ids": [2 * n, 2 * n + 1], "output_length": 24} for n in range(40)]
    path = moon(tmp_path / "moon.jsonl", *lines)
    found = json.loads(run(memory, path, "--slots", 4096, "--json").stdout)
    assert (found["mean_prompt_tokens"], found["mean_answer_tokens"]) == (1000.0, 24.0)
    with pytest.raises(CacheError, match="does not tell the lengths of answers"):
        run(memory, moon(tmp_path / "none.jsonl", {"hash_ids": [1, 2]}))


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
