"""`prefixcache sweep`: block size × capacity × policy × partial reuse, on all cores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixcache.cli import view
from prefixcache_bench.commands import options
from prefixcache_bench.commands.table import print_numbers

if TYPE_CHECKING:
    from prefixcache.types import Layout
    from prefixcache_bench.experiments.below import BelowAsked
    from prefixcache_bench.experiments.capacity import Capacity
    from prefixcache_bench.experiments.rows import Row
    from prefixcache_bench.experiments.sweep import Ceilings, Grid
    from prefixcache_bench.experiments.traces import Trace

_EXIT_INTERRUPTED = 130
_CAPACITIES = "5%,10%,25%,50%,inf"
_NEAR = 0.99
"""Of the best size's reuse: what counts as next to nothing lost."""


def sweep(
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
        str | None,
        typer.Option(
            metavar="LIST",
            help="Tokens per block, with commas. Default: 1,4,16,64,256, or multiples of the "
            "trace's own; of a small trace, those that fit.",
            show_default=False,
        ),
    ] = None,
    capacity: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Memory, with commas: tokens (65536, 64k), bytes (2GiB, with --layout), blocks "
            "(10000b), a share of the working set (25%), inf. Default: 5%,10%,25%,50%,inf; of a "
            "small trace, those that hold a block.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[str, typer.Option(metavar="LIST", help="Orders of eviction.")] = "lru",
    partial: Annotated[
        str, typer.Option(metavar="LIST", help="Reuse inside a block: off, blocks, tails.")
    ] = "off,tails",
    host: options.HostSizes = None,
    disk: options.DiskSizes = None,
    host_speed: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="With --host: how fast blocks go there and come back, with commas: tokens a "
            "second, or bytes (20GiB/s, with --layout).",
        ),
    ] = "200k",
    disk_speed: Annotated[
        str, typer.Option(metavar="LIST", help="With --disk: the same of the disk.")
    ] = "20k",
    prefill: Annotated[
        str,
        typer.Option(
            metavar="TOKENS", help="With --host or --disk: tokens that are computed in a second."
        ),
    ] = "10000",
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="NAME", help="Writes NAME.csv, .json, .png, .svg."),
    ] = Path("sweep"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the rows that NAME.csv has already.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", "-j", metavar="N", help="Processes. Default: all cores.", show_default=False
        ),
    ] = None,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Draw nothing.")] = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Sweep block size, capacity, policy and partial reuse over a trace: table, CSV, picture.

    Ctrl-C keeps the rows that are finished; --resume goes on from there.

    Example: prefixcache sweep chats.jsonl --block-size 16,64 --capacity 64k,25%,inf

    In bytes: prefixcache sweep chats.jsonl --layout llama-3.1-8b --capacity 2GiB,8GiB

    With memory below: prefixcache sweep chats.jsonl --capacity 5%,10% --host 0,10%,50%
    """
    from prefixcache.config import format_size
    from prefixcache.types import Partial
    from prefixcache_bench.experiments.below import tiers_asked
    from prefixcache_bench.experiments.capacity import parse_capacities
    from prefixcache_bench.experiments.layouts import layout_named
    from prefixcache_bench.experiments.progress import Progress
    from prefixcache_bench.experiments.rows import COLUMNS, TIER_COLUMNS, RowFile, key_of
    from prefixcache_bench.experiments.sweep import Grid, ceilings
    from prefixcache_bench.experiments.sweep import sweep as run

    sizes = None if block_size is None else options.numbers(block_size, "block size")
    shape = None if layout is None else layout_named(layout)
    measure = None if shape is None else shape.token_bytes
    capacities = tuple(one.measured(measure) for one in parse_capacities(capacity or _CAPACITIES))
    belows: tuple[BelowAsked, ...] = ()
    if host is not None or disk is not None:
        tiers = [(host, host_speed), (disk, disk_speed)]
        belows = tiers_asked(tiers, prefill, measure)
    if not resume:
        saved = [options.beside(out, ".csv"), options.beside(out, ".json")]
        options.refuse_overwriting(saved + ([] if no_picture else options.pictures(out)), force)
    policies = tuple(dict.fromkeys(options.split(policy, "policy")))
    modes = tuple(Partial(one) for one in options.partials(partial))
    trace = options.load_trace(path, form, name, system, tokenizer, hash_block, rate, think)
    multiples = (1, 2, 4, 8) if trace.is_hashed else (1, 4, 16, 64, 256)
    asked = sizes or tuple(trace.unit * multiple for multiple in multiples)
    for size in asked:
        trace.words(size)
    limits = ceilings(trace, asked)
    grid = Grid(asked, capacities, policies, modes, belows).fitted(
        limits.working_set, sizes=sizes is None, capacities=capacity is None
    )
    if left_out := _left_out(grid, asked, capacities):
        typer.echo(f"the trace is small: {left_out} left out; give them to have them", err=True)
    grid.check(trace, limits.working_set)
    columns = (*COLUMNS, *TIER_COLUMNS) if belows else COLUMNS
    file = RowFile(options.beside(out, ".csv"), _head(trace), resume=resume, columns=columns)
    wanted = set(grid.combinations())
    stopped = False
    missing = len(wanted - {key_of(row) for row in file.rows})
    with Progress("sweep", missing, quiet=as_json) as progress:

        def add(row: Row) -> None:
            file.add(row)
            progress.advance()

        try:
            run(trace, grid, limits.working_set, file.rows[:], add, processes=jobs)
        except KeyboardInterrupt:
            stopped = True
    file.close()
    rows = _ordered(file.rows, grid)
    report = _report(trace, limits) | options.account(trace)
    memory = _bytes(grid, limits, shape)
    if shape is not None:
        report |= {"layout": str(shape), "token_bytes": shape.token_bytes, "bytes": memory}
    from prefixcache_bench.experiments.rows import write_json

    write_json(options.beside(out, ".json"), report, rows)
    saved = [options.beside(out, ".csv"), options.beside(out, ".json")]
    if belows:
        report |= {"host_speed": host_speed, "disk_speed": disk_speed}
        report |= {"prefill": belows[0].computed_per_s}
    if rows and not no_picture:
        drawn = "draw_tiers" if belows else "draw_sweep"
        saved += options.draw(drawn, out, options.summary(trace), rows, limits)
    if as_json:
        view.print_json(report | {"rows": rows})
    else:
        _show(trace, rows, grid, limits)
        if memory:
            shown = (f"{text} = {format_size(held)}" for text, held in memory.items())
            typer.echo(f"memory, for {layout}: {', '.join(shown)}")
        typer.echo("wrote " + ", ".join(str(one) for one in saved))
    if stopped:
        typer.echo(
            f"stopped: {len(rows)} of {len(wanted)} rows are finished; --resume goes on", err=True
        )
        raise typer.Exit(_EXIT_INTERRUPTED)
    options.finish(trace)


def _left_out(grid: Grid, sizes: tuple[int, ...], capacities: tuple[Capacity, ...]) -> str:
    """Name what no default of a small trace can have."""
    parts = [f"blocks of {size}" for size in sizes if size not in grid.block_sizes]
    parts += [f"capacity {one.text}" for one in capacities if one not in grid.capacities]
    return f"{', '.join(parts)} {'is' if len(parts) == 1 else 'are'}" if parts else ""


def _bytes(grid: Grid, limits: Ceilings, shape: Layout | None) -> dict[str, int]:
    """Give the capacities of a grid in bytes, as far as they have an end."""
    found = {}
    for one in grid.capacities:
        tokens = one.tokens(min(grid.block_sizes), limits.working_set)
        if shape is not None and tokens is not None and one.kind != "blocks":
            found[one.text] = tokens * shape.token_bytes
    return found


def _head(trace: Trace) -> dict[str, str]:
    from prefixcache_bench.reports.provenance import provenance

    return provenance() | {"trace": trace.name, "fingerprint": trace.fingerprint}


def _report(trace: Trace, limits: Ceilings) -> dict[str, Any]:
    return {
        "run": _head(trace),
        "requests": len(trace),
        "prompt_tokens": trace.prompt_tokens,
        "working_set_tokens": limits.working_set,
        "ceilings": {
            "infinite_memory": {
                str(size): round(rate, 6) for size, rate in limits.by_block_size.items()
            },
            "infinite_memory_finest": round(limits.finest, 6),
        },
    }


def _ordered(rows: list[Row], grid: Grid) -> list[Row]:
    from prefixcache_bench.experiments.rows import key_of

    found = {key_of(row): row for row in rows}
    return [found[key] for key in grid.combinations() if key in found]


def _show(trace: Trace, rows: list[Row], grid: Grid, limits: Ceilings) -> None:
    from prefixcache_bench.experiments.rows import Key, key_of

    typer.echo(
        f"{options.summary(trace)}; working set {limits.working_set:,} tokens; "
        f"ceiling {limits.finest:.2%} (infinite memory, block size {trace.unit})"
    )
    if grid.belows:
        _show_tiers(rows, grid)
        return
    found = {key_of(row): row for row in rows}

    def cells(size: int, policy: str, partial: str) -> list[str]:
        rates = []
        for one in grid.capacities:
            row = found.get(Key(size, one.text, policy, partial))
            rates.append("-" if row is None else f"{100 * row['reused_rate']:.2f}")
        ceiling = limits.by_block_size[size] if partial == "off" else limits.finest
        return [*rates, f"{100 * ceiling:.2f}"]

    head = [*(one.text for one in grid.capacities), "ceiling"]
    for partial in grid.partials:
        typer.echo("")
        if len(grid.block_sizes) == 1:
            size = grid.block_sizes[0]
            typer.echo(f"prompt tokens reused, %: blocks of {size}, partial {partial.value}")
            table = [("policy", *head)]
            table += [(policy, *cells(size, policy, partial.value)) for policy in grid.policies]
            print_numbers(table, indent="  ")
            continue
        for policy in grid.policies:
            typer.echo(f"prompt tokens reused, %: policy {policy}, partial {partial.value}")
            table = [("block size", *head)]
            table += [(str(size), *cells(size, policy, partial.value)) for size in grid.block_sizes]
            print_numbers(table, indent="  ")
    if table := largest_sizes(rows, grid):
        typer.echo("")
        typer.echo("how large a block may be that loses at most 1 % of the best size's reuse:")
        print_numbers(table, indent="  ")


_TIER_HEAD = (
    *("pool", "below", "reused, %", "restored, %", "writes/request", "dropped", "declined"),
    *("first token, ms", "p99, ms"),
)


def _show_tiers(rows: list[Row], grid: Grid) -> None:
    """Print a table for each block size, policy and mode: a line for each pool with its tiers."""
    rates = {one.tokens_per_s for below in grid.belows for one in below.asked if one is not None}
    named = " or ".join(f"{rate:,.0f}" for rate in sorted(rates))
    typer.echo(
        f"computing {grid.belows[0].computed_per_s:,.0f} tokens a second"
        + (f", copying {named}" if named else "")
    )
    tables: dict[tuple[Any, ...], list[tuple[str, ...]]] = {}
    for row in rows:
        declined = sum(row[f"declined_{why}"] for why in ("slow", "busy", "room"))
        where = row["block_size"], row["policy"], row["partial"]
        tables.setdefault(where, [_TIER_HEAD]).append(
            (
                row["capacity"],
                row["below"],
                f"{100 * row['reused_rate']:.2f}",
                f"{row['restored_percent']:.2f}",
                f"{row['writes_a_request']:.1f}",
                f"{row['dropped_blocks']:,}",
                f"{declined:,}",
                f"{1000 * row['first_token_mean_s']:,.1f}",
                f"{1000 * row['first_token_p99_s']:,.1f}",
            )
        )
    for (size, policy, partial), table in tables.items():
        typer.echo("")
        typer.echo(f"blocks of {size}, policy {policy}, partial {partial}")
        print_numbers(table, indent="  ")


def largest_sizes(rows: list[Row], grid: Grid) -> list[tuple[str, ...]]:
    """Give, as a table, the largest block size with which next to nothing is lost.

    >>> from prefixcache_bench.experiments.capacity import parse_capacities
    >>> from prefixcache_bench.experiments.sweep import Grid
    >>> grid = Grid((1, 16, 256), tuple(parse_capacities("inf")))
    >>> rates = {1: 0.80, 16: 0.795, 256: 0.60}
    >>> row = {"capacity": "inf", "policy": "lru", "partial": "off"}
    >>> rows = [row | {"block_size": size, "reused_rate": rate} for size, rate in rates.items()]
    >>> largest_sizes(rows, grid)
    [('', 'inf'), ('lru, partial off', '16')]
    """
    rates: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        where = row["policy"], row["partial"], row["capacity"]
        rates.setdefault(where, {})[row["block_size"]] = row["reused_rate"]
    if len(grid.block_sizes) < 2:
        return []
    table = [("", *(one.text for one in grid.capacities))]
    for partial in grid.partials:
        for policy in grid.policies:
            cells = []
            for one in grid.capacities:
                found = rates.get((policy, partial.value, one.text), {})
                enough = [size for size in found if found[size] >= _NEAR * max(found.values())]
                # Of a sweep that was stopped, the sizes that are missing might be better.
                whole = len(found) == len(grid.block_sizes)
                cells.append(str(max(enough)) if whole else "-")
            table.append((f"{policy}, partial {partial.value}", *cells))
    return table
