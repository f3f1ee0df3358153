"""`prefixcache replay`: one configuration, with the full ledger, also over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixcache.cli import view
from prefixcache_bench.commands import options
from prefixcache_bench.commands.table import print_numbers

if TYPE_CHECKING:
    from prefixcache_bench.experiments.outcome import Outcome
    from prefixcache_bench.experiments.traces import Trace


def replay(
    path: options.Path_,
    form: options.Format = None,
    name: options.Name = None,
    system: options.SystemPrompts = "none",
    tokenizer: options.Tokenizer = None,
    hash_block: options.HashBlock = None,
    rate: options.Rate = None,
    think: options.Think = None,
    layout: options.Layout_ = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Tokens per block. Default: 16, or the trace's own.",
            show_default=False,
        ),
    ] = None,
    capacity: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Memory: tokens (65536, 64k), bytes (2GiB, with --layout), blocks (10000b), a "
            "share of the working set (25%), or inf.",
        ),
    ] = "inf",
    policy: Annotated[str, typer.Option(metavar="NAME", help="Order of eviction.")] = "lru",
    partial: Annotated[
        str, typer.Option(metavar="off|blocks|tails", help="Reuse inside a block.")
    ] = "tails",
    ghosts: Annotated[
        int | None,
        typer.Option(
            metavar="BLOCKS",
            help="Evicted blocks to remember. Default: all, so that cold is what was never seen; "
            "for policies that learn from them, as many as they have when serving.",
            show_default=False,
        ),
    ] = None,
    windows: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, max=10_000, help="Parts of the trace's time to show the ledger for."
        ),
    ] = 12,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the ledger over time, as PNG and SVG.", show_default=False
        ),
    ] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Replay a trace through the cache: hit rate and the fate of every prompt token, over time.

    Example: prefixcache replay chats.jsonl --block-size 16 --capacity 64k --policy lru --json
    """
    from prefixcache.types import Partial
    from prefixcache_bench.experiments.capacity import parse_capacity
    from prefixcache_bench.experiments.curve import curve
    from prefixcache_bench.experiments.layouts import layout_named
    from prefixcache_bench.experiments.progress import Progress
    from prefixcache_bench.experiments.replay import Configuration
    from prefixcache_bench.experiments.replay import replay as run
    from prefixcache_bench.reports.provenance import provenance

    shape = None if layout is None else layout_named(layout)
    asked = parse_capacity(capacity).measured(None if shape is None else shape.token_bytes)
    if picture is not None:
        options.refuse_overwriting(options.pictures(picture), force)
    mode = Partial(options.partials(partial)[0])
    trace = options.load_trace(path, form, name, system, tokenizer, hash_block, rate, think)
    block_size = max(16, trace.unit) if block_size is None else block_size
    working_set = 0
    if asked.kind == "percent":
        working_set = curve(trace, trace.unit).working_set * trace.unit
    blocks = asked.blocks(block_size, working_set)
    configuration = Configuration(block_size, blocks, policy, mode, ghosts)
    with Progress("replay", len(trace), quiet=as_json) as progress:
        outcome = run(trace, configuration, num_windows=max(1, windows), advance=progress.advance)
    fields = {"trace": trace.name, "fingerprint": trace.fingerprint} | outcome.fields()
    fields |= options.account(trace)
    if shape is not None:
        held = None if blocks is None else blocks * block_size * shape.token_bytes
        fields |= {"layout": str(shape), "capacity_bytes": held}
    fields |= {"windows": outcome.window_fields(), "run": provenance()}
    if picture is not None:
        how = f"capacity {asked.text}, {policy}, partial {mode}"
        title = f"{trace.name}: blocks of {block_size}, {how}"
        options.draw("draw_ledger", picture, title, fields["windows"])
    if as_json:
        view.print_json(fields)
    else:
        _show(trace, outcome, fields, asked.text)
    options.finish(trace)


def _show(trace: Trace, outcome: Outcome, fields: dict[str, Any], capacity: str) -> None:
    typer.echo(
        f"{options.summary(trace)}; "
        f"blocks of {outcome.block_size}, capacity {capacity}, {outcome.policy}, "
        f"partial {outcome.partial}"
    )
    percent = fields["ledger_percent"]
    rows = [("fate", "tokens", "%")]
    rows += [
        (fate, f"{fields['ledger'][fate]:,}", f"{share:.3f}")
        for fate, share in percent.items()
        if fate != "joined"
    ]
    rows.append(("total", f"{fields['ledger']['total']:,}", f"{sum(percent.values()):.3f}"))
    print_numbers(rows)
    typer.echo(
        f"reused {outcome.reused_rate:.4%} of the prompt tokens; {outcome.evictions:,} blocks "
        f"evicted, {outcome.peak_blocks:,} at the peak; {outcome.cpu_s:.1f} s of CPU"
    )
    if outcome.partial == "off":
        typer.echo(f"parts of full blocks would make that {outcome.hit_rate_partial:.4%}")
    shown = [window for window in fields["windows"] if window["total"]]
    if len(shown) < 2:
        return
    typer.echo("over time, % of the prompt tokens of each part:")
    fates = [fate for fate in percent if outcome.ledger.total and fields["ledger"][fate]]
    table = [("from", "requests", *fates)]
    table += [
        (
            f"{window['start_s'] / 60:.1f} min",
            f"{window['requests']:,}",
            *(f"{100 * window[fate] / window['total']:.1f}" for fate in fates),
        )
        for window in shown
    ]
    print_numbers(table, indent="  ")
