import json
import re

import pytest
from rich.console import Console

from demo import logs
from prefixcache_worker.demo import picture, report, summary, view
from prefixcache_worker.demo.compare import Verdict
from prefixcache_worker.demo.live import LiveView
from prefixcache_worker.demo.record import Fate

PROMISED = {
    "identical",
    "numerical_ties",
    "requests",
    "tokens_sent",
    "tokens_computed",
    "tokens_ideal",
    "ttft_cold_ms_median",
    "ttft_warm_ms_median",
    "killed_worker",
    "pool_bytes_used",
    "separate_caches_bytes",
}


@pytest.fixture
def figures():
    return report.figures(logs.shared_run(), logs.unshared_run(), Verdict(4, 12, ()))


def test_the_report_has_every_promised_field_and_says_how_it_was_made(figures, tmp_path):
    whole = report.header("a model") | figures
    assert whole.keys() >= PROMISED
    assert whole["killed_worker"].keys() >= {"leases", "blocks_returned", "takeover_ms"}
    assert {"command", "commit", "machine", "versions", "seed"} <= whole.keys()
    report.write(tmp_path / "out" / "demo.json", whole)
    assert json.loads((tmp_path / "out" / "demo.json").read_text()) == json.loads(json.dumps(whole))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["demo.json"]


def test_the_figures_follow_from_the_requests(figures):
    assert figures["requests"] == 4
    assert figures["tokens_sent"] == 4 * 1004
    assert figures["tokens_ideal"] == 1004 + 3 * 4
    # d/1 computed 492 although 512 of the 1,000 shared tokens and the rest were there for others.
    assert figures["tokens_computed"] == 1004 + 4 + 4 + 492
    assert figures["tokens_lost"] == 256
    assert figures["tokens_separate_caches"] == (1004 + 4 + 4) + 1004
    assert figures["ttft_cold_ms_median"] == pytest.approx(1200)
    assert figures["ttft_warm_ms_median"] == pytest.approx(100)
    assert figures["ttft_ratio"] == pytest.approx(12)


def test_what_decoding_read_is_summed_and_compared_with_reading_sequence_by_sequence(figures):
    assert figures["decode_kv_bytes_read"] == 3_000_000
    assert figures["decode_kv_bytes_per_sequence"] == 4_000_000
    assert figures["decode_kv_ratio"] == pytest.approx(1.33)
    assert figures["decode_kv_side_by_side"]["decode_kv_ratio"] == pytest.approx(2.0)
    assert [line["decode_kv_bytes_read"] for line in figures["per_request"]][1:3] == [
        10**6,
        500_000,
    ]


def test_memory_counts_a_shared_prefix_once_for_the_pool_and_once_per_separate_cache(figures):
    # 1,006 stored tokens a request: 62 whole shared blocks, and one block of its own for each.
    assert figures["pool_blocks_expected"] == 62 + 4
    assert figures["pool_bytes_used"] == 66 * 16 * 46080
    assert figures["separate_caches_bytes"] == (62 + 3 + 62 + 1) * 16 * 46080


def test_the_ratio_at_1000_tokens_uses_only_undisturbed_requests(figures):
    long = figures["ttft_at_1000_tokens"]
    assert (long["num_cold"], long["num_warm"]) == (1, 1)
    assert long["ratio"] == pytest.approx(12)


def test_fates_are_told_apart():
    fates = [request.fate for request in logs.shared_run().requests]
    assert fates == [Fate.COLD, Fate.WARM, Fate.JOINED, Fate.TAKEOVER]


@pytest.mark.slow
def test_the_picture_is_drawn_with_and_without_a_death(figures, tmp_path):
    run = logs.shared_run()
    picture.draw(tmp_path / "a.png", run, logs.unshared_run(), figures)
    run.death = None
    picture.draw(tmp_path / "b.png", run, logs.unshared_run(), figures)
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 20_000


def show(console, verdict, figures):
    run = logs.shared_run()
    summary.show_requests(console, run)
    summary.show_totals(console, run, verdict, figures)


def test_the_summary_says_fates_in_words_and_the_verdict(figures):
    console = Console(record=True, width=160, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        show(console, Verdict(4, 12, ()), figures)
    text = console.export_text()
    for word in (
        "cold",
        "warm",
        "joined",
        "takeover",
        "4,016",
        "12.0x",
        "token for token",
        "1.3x as much",
    ):
        assert word in text
    assert "w2 (pid 99) was killed with SIGKILL in mid-prefill" in text
    assert "w1 was waiting for that prefix with d/1: it took over 12 ms after the kill" in text
    assert "At most 256 tokens of work died with it. Sent again, to others: d/1." in text


def test_plain_lines_carry_no_escapes_and_one_line_per_request(capsys):
    plain = view.PlainView(Console(width=160))
    plain.phase(1, "One at a time", "why")
    for request in logs.shared_run().requests:
        plain.sent(request)
        plain.finished(request)
    plain.died(logs.shared_run().death)
    plain.close()
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert sum("/1 " in line and " ms " in line for line in text.splitlines()) == 4


def test_the_live_view_draws_every_state(capsys):
    run = logs.shared_run()
    console = Console(force_terminal=True, width=150, height=60)
    live = LiveView(console, run.workers, 4)
    live.phase(1, "One at a time", "why")
    for request in run.requests:
        live.sent(request)
    live.say("a sentence")
    for request in run.requests[:3]:
        live.finished(request)
    live.died(run.death)
    live.settled(run.death)
    with console.capture() as capture:
        console.print(live._draw())
    live.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capture.get())
    for word in ("One at a time", "a/1", "joined", "killed", "3 of 4 requests", "d/1 answers 3"):
        assert word in text
