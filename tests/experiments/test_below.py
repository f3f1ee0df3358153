"""A replay with tiers below the pool: what it finds, what that costs, and how it is asked for."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.test_commands import run
from prefixcache.errors import InvalidRequest
from prefixcache.types import Namespace, Partial, pack, unpack
from prefixcache_bench.commands.curve import curve as curve_command
from prefixcache_bench.commands.sweep import sweep
from prefixcache_bench.experiments.below import Tiers, replay_below, tiers_asked
from prefixcache_bench.experiments.capacity import parse_capacities
from prefixcache_bench.experiments.curve import curve
from prefixcache_bench.experiments.replay import Configuration, replay
from prefixcache_bench.experiments.sweep import Grid
from prefixcache_bench.experiments.traces import Request, Trace

SPACE = Namespace("m")
NONE = Tiers("", (0,), (0.0,), 0.001)


def chats(
    number: int = 300, seed: int = 0, unit: int = 1, apart_s: float = 10.0, num_chats: int = 24
) -> Trace:
    """Some dozen chats that grow, in turns at random."""
    draw = random.Random(seed)
    told: dict[int, list[int]] = {}
    requests = []
    for at in range(number):
        chat = draw.randrange(num_chats)
        tokens = told.setdefault(chat, [])
        tokens += [chat * 100_000 + len(tokens) + more for more in range(draw.randint(4, 40))]
        prompt = len(tokens) if unit > 1 else max(1, len(tokens) - 3)
        requests.append(Request(at * apart_s, SPACE, pack(tokens), prompt, prompt * unit))
        if len(tokens) > 160:
            del told[chat]
    return Trace("chats", requests, unit=unit)


@pytest.mark.parametrize("unit", [1, 16])
@pytest.mark.parametrize("partial", list(Partial))
@pytest.mark.parametrize("blocks", [20, 60, None])
def test_without_tiers_it_is_the_replay(partial: Partial, blocks: int | None, unit: int) -> None:
    trace = chats(unit=unit)
    asked = Configuration(4 * unit, blocks, "lru", partial)
    found, traffic = replay_below(trace, asked, NONE)
    was = replay(trace, asked)
    assert found.ledger == was.ledger
    assert found.hit_tokens == was.hit_tokens
    assert found.evictions == was.evictions
    assert (traffic.restored_tokens, traffic.written_blocks) == (0, 0)
    computed = trace.prompt_tokens - was.ledger.reused
    assert traffic.first_token_s[0] == pytest.approx(computed * 0.001 / len(trace))


@pytest.mark.parametrize("unit", [1, 16])
def test_a_tier_that_takes_no_time_brings_what_a_larger_pool_does(unit: int) -> None:
    trace = chats(2000, unit=unit, num_chats=200)
    one = curve(trace, 4 * unit)
    pool, host = 640, 2000
    found, traffic = replay_below(
        trace, Configuration(4 * unit, pool), Tiers("", (host,), (0.0,), 0.001)
    )
    here, together = one.hit_tokens([pool, pool + host])
    assert together > 1.5 * here, "there is something to be gained"
    assert found.hit_tokens == pytest.approx(together, rel=0.05), "a part of the pool is kept free"
    assert found.hit_tokens - traffic.restored_tokens == pytest.approx(here, rel=0.15)
    assert traffic.restored_blocks[0] >= traffic.restored_tokens // (4 * unit)
    assert sum(traffic.declined.values()) == traffic.dropped_blocks == 0


def test_host_and_disk_bring_what_one_pool_of_all_three_does() -> None:
    trace = chats(2000, num_chats=200)
    one, asked = curve(trace, 4), Configuration(4, 640)
    found, traffic = replay_below(trace, asked, Tiers("", (1000, 2000), (0.0, 1e-5), 0.001))
    here, together = one.hit_tokens([640, 3640])
    assert found.hit_tokens == pytest.approx(together, rel=0.05)
    assert found.hit_tokens - traffic.restored_tokens == pytest.approx(here, rel=0.15)
    assert min(traffic.restored_blocks) > 100
    assert traffic.disk_written_blocks > 1000
    alone, of_disk = replay_below(trace, asked, Tiers("", (0, 3000), (0.0, 1e-5), 0.001))
    assert alone.hit_tokens == pytest.approx(together, rel=0.05)
    assert of_disk.restored_blocks[0] == 0
    assert of_disk.disk_written_blocks == of_disk.written_blocks


def test_a_disk_slower_than_computing_is_declined_and_memory_above_it_is_not() -> None:
    trace = chats(2000, num_chats=200, unit=16)
    tiers = Tiers("", (1000, 2000), (1e-5, 2e-3), 0.001)
    _, traffic = replay_below(trace, Configuration(64, 640), tiers)
    assert traffic.declined["slow"] > 20
    assert traffic.restored_blocks[0] > 1000
    assert traffic.restored_blocks[1] < traffic.restored_blocks[0] / 10


def test_what_goes_on_to_a_disk_takes_the_time_of_the_disk() -> None:
    trace = chats(1000, num_chats=200, apart_s=0.01)
    asked = Configuration(4, 640)
    _, quick = replay_below(trace, asked, Tiers("", (500, 2000), (1e-5, 1e-5), 1e-5))
    _, slow = replay_below(trace, asked, Tiers("", (500, 2000), (1e-5, 1e-2), 1e-5))
    assert quick.disk_written_blocks > 1000
    assert slow.disk_written_blocks < quick.disk_written_blocks / 4


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 99),
    pool=st.integers(60, 200),
    host=st.integers(1, 400),
    speed=st.sampled_from([0.0, 1e-5, 1e-4, 1e-3, 1e-2]),
    partial=st.sampled_from(list(Partial)),
)
def test_a_tier_of_any_speed_and_size_costs_little_and_may_bring_much(
    seed: int, pool: int, host: int, speed: float, partial: Partial
) -> None:
    trace = chats(300, seed, apart_s=0.2)
    asked = Configuration(4, pool, "lru", partial)
    kept_free = max(pool // 16, min(64, pool // 8)) + 1
    less = Configuration(4, pool - kept_free, "lru", partial)
    found, traffic = replay_below(trace, asked, Tiers("", (host,), (speed,), 0.001))
    _, without = replay_below(trace, less, NONE)
    assert found.ledger.total == trace.prompt_tokens
    assert traffic.restored_tokens <= found.ledger.hit
    assert traffic.first_token_s[0] <= 1.1 * without.first_token_s[0]


def test_a_tier_slower_than_computing_is_declined() -> None:
    trace = chats(800)
    asked = Configuration(4, 160)
    _, quick = replay_below(trace, asked, Tiers("", (500,), (1e-5,), 0.001))
    _, slow = replay_below(trace, asked, Tiers("", (500,), (1e-2,), 0.001))
    _, none = replay_below(trace, asked, NONE)
    assert quick.declined["slow"] == 0
    assert slow.declined["slow"] > 20
    assert slow.restored_tokens < quick.restored_tokens / 4
    assert quick.first_token_s[0] < 0.8 * none.first_token_s[0]


def test_hashes_stand_for_as_many_tokens_as_they_do() -> None:
    trace = chats(800, unit=16)
    asked = Configuration(64, 160)
    _, at_par = replay_below(trace, asked, Tiers("", (500,), (0.0009,), 0.001))
    assert at_par.declined["slow"] > 20, "nine tenths of computing are not worth it"
    _, quicker = replay_below(trace, asked, Tiers("", (500,), (0.0001,), 0.001))
    assert quicker.declined["slow"] == 0


def test_a_pool_that_can_keep_nothing_free_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="a pool of 6 blocks is too small"):
        replay_below(chats(10), Configuration(4, 6), Tiers("", (8,), (0.0,), 0.001))


def test_of_a_small_trace_pools_that_can_keep_nothing_free_are_left_out() -> None:
    capacities = tuple(parse_capacities("5%,50%,inf"))
    beside = Grid((4, 16), capacities, belows=tiers_asked([("0,50%", "1k")], "1k", None))
    fitted = beside.fitted(200, sizes=True, capacities=True)
    assert [one.text for one in fitted.capacities] == ["50%", "inf"]
    assert fitted.block_sizes == (4,)
    alone = Grid((4, 16), capacities).fitted(200, sizes=True, capacities=True)
    assert len(alone.capacities) == 3


def lines(trace: Trace, path: Path) -> Path:
    """Write a trace down."""
    told = [
        {"t": one.t, "namespace": "m", "tokens": unpack(one.tokens).tolist(), "prompt": one.prompt}
        for one in trace
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in told))
    return path


def test_a_sweep_has_a_row_for_each_pool_with_each_tier(tmp_path: Path) -> None:
    trace = chats(600, num_chats=60)
    path, out = lines(trace, tmp_path / "chats.jsonl"), tmp_path / "out" / "one"
    out.parent.mkdir()
    asked = (
        *(sweep, path, "--block-size", "4,8", "--capacity", "10%,inf", "--host", "0,40%"),
        *("--partial", "off", "--prefill", 1000, "--host-speed", "100k", "-o", out, "-j", 1),
    )
    told = run(*asked)
    assert told.exit_code == 0, told.stderr
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [(row["block_size"], row["capacity"], row["below"]) for row in rows] == [
        (size, pool, below)
        for size in (4, 8)
        for pool in ("10%", "inf")
        for below in ("none", "host 40%")
    ]
    small = Configuration(4, rows[0]["capacity_blocks"])
    assert rows[0]["hit_tokens"] == replay(trace, small).hit_tokens
    host = rows[1]
    assert host["restored_tokens"] > 0
    assert host["reused_rate"] > rows[0]["reused_rate"]
    assert host["first_token_mean_s"] < rows[0]["first_token_mean_s"]
    assert host["writes_a_request"] == pytest.approx(host["written_blocks"] / len(trace), abs=1e-3)
    assert "computing 1,000 tokens a second, copying 102,400" in told.stdout
    assert "  10%   host 40%" in told.stdout
    assert out.with_suffix(".png").stat().st_size > 10_000
    csv = out.with_suffix(".csv").read_text().splitlines()
    out.with_suffix(".csv").write_text("\n".join(csv[:-3]) + "\n")
    again = run(*asked, "--resume", "--json")
    found = json.loads(again.stdout)["rows"]
    assert [one["cpu_s"] for one in found[:5]] == [one["cpu_s"] for one in rows[:5]]
    assert [one | {"cpu_s": 0} for one in found] == [one | {"cpu_s": 0} for one in rows]


def test_a_curve_says_what_a_tier_adds(tmp_path: Path) -> None:
    trace = chats(600, num_chats=60)
    path = lines(trace, tmp_path / "chats.jsonl")
    told = run(curve_command, path, "--block-size", 4, "--capacity", "300b", "--host", "0,900b,inf",
               "--json")  # fmt: skip
    (found,) = json.loads(told.stdout)["curves"]
    one = curve(trace, 4)
    total = trace.prompt_tokens
    rates = [round(rate / total, 6) for rate in one.hit_tokens([300, 1200, one.working_set])]
    assert [part["hit_rate"] for part in found["below"]] == rates
    assert {part["pool_hit_rate"] for part in found["below"]} == {rates[0]}
    assert found["below"][1]["restored_rate"] == [pytest.approx(rates[1] - rates[0], abs=2e-6)]
    assert [part["below"] for part in found["below"]] == ["none", "host 900b", "host inf"]
    both = run(curve_command, path, "--block-size", 4, "--capacity", "300b", "--host", "500b",
               "--disk", "400b", "--json")  # fmt: skip
    (part,) = json.loads(both.stdout)["curves"][0]["below"]
    assert (part["below"], part["hit_rate"]) == ("host 500b + disk 400b", rates[1])
    assert sum(part["restored_rate"]) == pytest.approx(rates[1] - rates[0], abs=3e-6)
    shown = run(curve_command, path, "--block-size", 4, "--capacity", "300b", "--host", "900b")
    assert "with tiers below the pool that take no time" in shown.stdout
    assert f"{100 * rates[1]:.4f}" in shown.stdout


@pytest.mark.parametrize(
    ("command", "arguments", "why"),
    [
        ("sweep", ["--host", "lots"], "cannot read the capacity 'lots'"),
        ("sweep", ["--host", ","], "names no size of a tier"),
        ("sweep", ["--host", "1GiB"], "is in bytes; say with --layout"),
        ("sweep", ["--disk", "50%", "--disk-speed", "b"], "cannot read the capacity 'b'"),
        ("sweep", ["--disk", "2"], "capacity 2 does not hold one block of 4"),
        ("sweep", ["--host", "2"], "capacity 2 does not hold one block of 4"),
        ("sweep", ["--host", "50%", "--host-speed", "5%"], "'5%' is no speed"),
        ("sweep", ["--host", "50%", "--host-speed", ","], "names no speed"),
        ("sweep", ["--host", "50%", "--host-speed", "2GiB/s"], "in bytes; say with --layout"),
        ("sweep", ["--host", "50%", "--prefill", "inf"], "'inf' is no speed"),
        ("sweep", ["--host", "50%", "--capacity", "5b"], "a pool of 5 blocks is too small"),
        ("sweep", ["--host", "50%", "--policy", "lfu-flat"], "nothing can lie below"),
        ("curve", ["--host", "50%", "--capacity", ""], "names no capacity"),
        ("curve", ["--host", "50%"], "say with --capacity how large that is"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(
    command: str, arguments: list[str], why: str, tmp_path: Path
) -> None:
    path = lines(chats(60), tmp_path / "chats.jsonl")
    verb = sweep if command == "sweep" else curve_command
    more = ["-o", tmp_path / "out", "-j", 1] if command == "sweep" else []
    if command == "sweep" and "--capacity" not in arguments:
        more += ["--capacity", "20%"]
    with pytest.raises(InvalidRequest, match=re.escape(why)):
        run(verb, path, "--block-size", 4, *arguments, *more)
