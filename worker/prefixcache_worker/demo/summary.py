"""The demo's last word: every request, then the totals, then the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefixcache_worker.demo.below import Below
from prefixcache_worker.demo.compare import Verdict
from prefixcache_worker.demo.record import Run
from prefixcache_worker.demo.sentence import Sentence
from prefixcache_worker.demo.view import obituary, request_table

_MEGABYTE = 1e6


def show_requests(console: Console, run: Run) -> None:
    """Print one line per request, in the order in which they were sent."""
    console.print(Text("Every request", style="bold"))
    console.print(request_table(run.requests, console.width))


def show_totals(
    console: Console,
    run: Run,
    verdict: Verdict,
    report: dict[str, Any],
    sentence: Sentence | None = None,
    below: Below | None = None,
) -> None:
    """Print what it all came to."""
    console.print()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for name, value, remark in _rows(report):
        table.add_row(name, value, Text(remark, style="dim"))
    console.print(table)
    if run.death is not None:
        console.print()
        console.print(Text("\n".join(obituary(run.death))))
    if sentence is not None:
        console.print()
        console.print(Text(f"“{sentence.text.strip()}”"))
        console.print(Text(sentence.told(), style="" if sentence.survived else "bold red"))
    if below is not None:
        console.print()
        console.print(Text(f"In a pool of {below.num_blocks:,} blocks, with a disk below it:"))
        for line in below.told():
            console.print(Text(f"  {line}", style="" if below.kept else "bold red"))
    console.print()
    for difference in verdict.differences:
        console.print(Text(str(difference), style="yellow" if difference.tie else "bold red"))
    console.print(_verdict(verdict))
    if run.blocks_leaked:
        text = f"{run.blocks_leaked} blocks never came back although all requests have ended."
        console.print(Text(text, style="bold red"))


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    sent, computed = report["tokens_sent"], report["tokens_computed"]
    ideal, lost = report["tokens_ideal"], report["tokens_lost"]
    pool, separate = report["pool_bytes_used"], report["separate_caches_bytes"]
    long = report["ttft_at_1000_tokens"]
    rows = [
        ("requests", f"{report['requests']:,}", f"on {report['workers']} workers"),
        ("prompt tokens sent", f"{sent:,}", ""),
        (
            "prompt tokens computed",
            f"{computed:,}",
            f"{100 * computed / sent:.1f} % of those sent; a cache per worker: "
            f"{report['tokens_separate_caches']:,}",
        ),
        (
            "ideal",
            f"{ideal:,}",
            "every token of a shared prefix once; we are "
            f"{report['tokens_over_ideal_percent']:+.2f} % off"
            + (f", and up to {lost} tokens died with the worker" if lost else ""),
        ),
        (
            "first token, cold",
            _ms(report["ttft_cold_ms_median"]),
            f"median; joined {_ms(report['ttft_joined_ms_median'])}, without a cache "
            f"{_ms(report['ttft_unshared_ms_median'])}",
        ),
        (
            "first token, warm",
            _ms(report["ttft_warm_ms_median"]),
            f"median; {_times(report['ttft_ratio'])} sooner than cold",
        ),
    ]
    if long["ratio"]:
        rows.append(
            (
                "at 1,000 tokens",
                f"{long['ratio']:.1f}x",
                f"sooner than cold; system prompts of {_lengths(long['system_tokens'])} tokens, "
                "one request at a time: "
                f"cold {_ms(long['cold_ms'])}, warm {_ms(long['warm_ms'])}",
            )
        )
    if report["decode_kv_ratio"] and report["compared"] == "tokens":  # else nothing is read once
        read, alone = report["decode_kv_bytes_read"], report["decode_kv_bytes_per_sequence"]
        beside = report["decode_kv_side_by_side"]["decode_kv_ratio"]
        rows.append(
            (
                "read to decode",
                f"{read / _MEGABYTE:,.0f} MB",
                "keys and values, a shared prefix once a step; sequence by sequence it were "
                f"{alone / _MEGABYTE:,.0f} MB, {_times(report['decode_kv_ratio'])} as much"
                + (f" (side by side {_times(beside)})" if beside else ""),
            )
        )
    rows += [
        (
            "memory used",
            f"{pool / _MEGABYTE:,.0f} MB",
            f"in one pool, {report['pool_blocks_used']:,} blocks; a cache per worker would hold "
            f"{separate / _MEGABYTE:,.0f} MB",
        ),
        (
            "time",
            f"{report['seconds_shared']:.0f} s",
            f"with the shared cache, {report['seconds_unshared']:.0f} s without any",
        ),
    ]
    return rows


def _verdict(verdict: Verdict) -> Text:
    if verdict.identical:
        how = "token for token"
        if verdict.of_bits:
            how = "bit for bit: the two best logits of each step have the same bits"
        ties = f", {verdict.numerical_ties} numerical ties aside" if verdict.numerical_ties else ""
        return Text(
            f"All {verdict.num_compared} answers ({verdict.num_tokens:,} tokens) are those of the "
            f"model without any cache, {how}{ties}.",
            style="bold green",
        )
    wrong = sum(not difference.tie for difference in verdict.differences)
    return Text(
        f"FAILED: {wrong} of {verdict.num_compared} answers are not those of the model without a "
        f"cache.",
        style="bold red",
    )


def _ms(value: float | None) -> str:
    return "none" if value is None else f"{value:,.0f} ms"


def _lengths(lengths: Sequence[int]) -> str:
    return " and ".join(f"{length:,}" for length in lengths)


def _times(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f}x"
