"""`prefixcache curve`: hit rate against capacity, for all capacities in one pass."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixcache.cli import view
from prefixcache.errors import InvalidRequest
from prefixcache_bench.commands import options
from prefixcache_bench.commands.table import print_numbers

if TYPE_CHECKING:
    from prefixcache.types import Layout
    from prefixcache_bench.experiments.below import BelowAsked
    from prefixcache_bench.experiments.curve import Curve

_SHARES = (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)


def curve(
    path: options.Path_,
    form: options.Format = None,
    name: options.Name = None,
    system: options.SystemPrompts = "none",
    tokenizer: options.Tokenizer = None,
    hash_block: options.HashBlock = None,
    rate: options.Rate = None,
    think: options.Think = None,
    block_size: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Tokens per block, with commas. Default: 16, or the trace's own.",
            show_default=False,
        ),
    ] = None,
    capacity: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Also show these capacities: 64k, 2GiB, 10000b, 25%, inf.",
            show_default=False,
        ),
    ] = None,
    host: options.HostSizes = None,
    disk: options.DiskSizes = None,
    layout: options.Layout_ = None,
    points: Annotated[int, typer.Option(metavar="N", help="Points of the CSV and JSON.")] = 200,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="NAME",
            help="Write NAME.csv, .png, .svg.",
            show_default=False,
        ),
    ] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Show the LRU hit rate at every capacity, found in one pass, with the knee.

    Whole blocks only.  Equal to replays at each capacity, to every digit.  A tier below the pool
    that takes no time keeps with it what one pool of both sizes would: --host says what it adds.

    Example: prefixcache curve chats.jsonl --block-size 16,256 --layout llama-3.1-8b -o curve
    """
    from prefixcache_bench.experiments.below import tiers_asked
    from prefixcache_bench.experiments.capacity import parse_capacities
    from prefixcache_bench.experiments.curve import curve as run
    from prefixcache_bench.experiments.layouts import layout_named
    from prefixcache_bench.reports.provenance import provenance

    shape = None if layout is None else layout_named(layout)
    measure = None if shape is None else shape.token_bytes
    asked = [] if capacity is None else parse_capacities(capacity)
    asked = [one.measured(measure) for one in asked]
    belows: tuple[BelowAsked, ...] = ()
    if host is not None or disk is not None:
        belows = tiers_asked([(host, "1"), (disk, "1")], "1", measure)
        if not asked:
            raise InvalidRequest(
                f"--host {host} and --disk {disk} lie below a pool: say with --capacity how large "
                "that is, for example --capacity 5%,10%"
            )
    if out is not None:
        options.refuse_overwriting([options.beside(out, ".csv"), *options.pictures(out)], force)
    trace = options.load_trace(path, form, name, system, tokenizer, hash_block, rate, think)
    sizes = (max(16, trace.unit),) if block_size is None else options.numbers(block_size, "size")
    curves = [run(trace, size) for size in sizes]
    working_set = curves[0].working_set * curves[0].block_size
    sizes_asked = [*asked, *(one.size for below in belows for one in below.asked if one)]
    if any(one.kind == "percent" for one in sizes_asked):
        working_set = run(trace, trace.unit).working_set * trace.unit
    report: dict[str, Any] = {
        "trace": trace.name,
        "fingerprint": trace.fingerprint,
        "requests": len(trace),
        "prompt_tokens": trace.prompt_tokens,
        **options.account(trace),
        "layout": None if shape is None else str(shape),
        "token_bytes": None if shape is None else shape.token_bytes,
        "curves": [],
    }
    for one in curves:
        explicit = [
            (found.text, found.blocks(one.block_size, working_set) or one.working_set)
            for found in asked
        ]
        fields = _fields(one, explicit, points, shape)
        if belows:
            fields["below"] = [
                _below(one, pool, size, working_set) for pool in explicit for size in belows
            ]
        report["curves"].append(fields)
    report["run"] = provenance()
    if out is not None:
        _write_csv(options.beside(out, ".csv"), report)
        typer.echo(f"wrote {options.beside(out, '.csv')}", err=True)
        title = f"{trace.name}: LRU, whole blocks, every capacity"
        options.draw("draw_curve", out, title, curves, trace.unit, shape, layout or "")
    if as_json:
        view.print_json(report)
    else:
        for fields in report["curves"]:
            _show(trace.name, fields, shape)
        if trace.broken or trace.not_counted:
            typer.echo(f"of {options.summary(trace)}")
    options.finish(trace)


def _fields(
    one: Curve, explicit: list[tuple[str, int]], points: int, layout: Layout | None
) -> dict[str, Any]:
    knee = one.knee()
    at = one.capacities(max(2, points))
    named = [("knee", knee), *explicit]
    named += [(f"{share:.0%} of the ceiling", one.smallest_for(share)) for share in _SHARES]
    return {
        "block_size": one.block_size,
        "working_set_blocks": one.working_set,
        "ceiling": round(one.hit_rates([one.working_set])[0], 6),
        "knee_blocks": knee,
        "marks": [{"mark": text} | _point(one, blocks, layout) for text, blocks in named],
        "points": [_point(one, blocks, layout) for blocks in at],
    }


def _below(
    one: Curve, pool: tuple[str, int], below: BelowAsked, working_set: int
) -> dict[str, Any]:
    """Say what a pool finds, and what comes back from each tier below it."""
    text, blocks = pool
    sizes = list(below.tiers(one.block_size, working_set).blocks)
    sums = [blocks]
    for size in sizes:
        sums.append(one.working_set if size is None else sums[-1] + size)
    tokens = one.hit_tokens(sums)
    total = max(1, one.prompt_tokens)
    return {
        "pool": text,
        "pool_blocks": blocks,
        "below": below.text,
        "below_blocks": sizes,
        "hit_rate": round(tokens[-1] / total, 6),
        "pool_hit_rate": round(tokens[0] / total, 6),
        "restored_rate": [round((after - before) / total, 6) for before, after in pairwise(tokens)],
    }


def _point(one: Curve, blocks: int, layout: Layout | None) -> dict[str, Any]:
    tokens = blocks * one.block_size
    hit_tokens, hit_blocks = one.hit_tokens([blocks])[0], one.hit_blocks([blocks])[0]
    fields: dict[str, Any] = {
        "capacity_blocks": blocks,
        "capacity_tokens": tokens,
        "hit_tokens": hit_tokens,
        "hit_rate": round(hit_tokens / max(1, one.prompt_tokens), 6),
        "block_hit_rate_ceil": round(hit_blocks / max(1, one.prompt_blocks), 6),
    }
    if layout is not None:
        fields["capacity_bytes"] = tokens * layout.token_bytes
    return fields


def _write_csv(path: Path, report: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("w", newline="")
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}") from None
    with opened as file:
        for name, value in report["run"].items():
            file.write(f"# {name}: {value}\n")
        rows = [
            {"block_size": one["block_size"]} | point
            for one in report["curves"]
            for point in one["points"]
        ]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _show(name: str, fields: dict[str, Any], layout: Layout | None) -> None:
    from prefixcache.config import format_size

    typer.echo(
        f"{name}: blocks of {fields['block_size']}, LRU, whole blocks; ceiling "
        f"{fields['ceiling']:.2%} with {fields['working_set_blocks']:,} blocks"
    )
    head = ["", "blocks", "tokens", "hit rate, %"]
    table = [[*head, "bytes"] if layout else head]
    for mark in sorted(fields["marks"], key=lambda one: int(one["capacity_blocks"])):
        row = [mark["mark"], f"{mark['capacity_blocks']:,}", f"{mark['capacity_tokens']:,}"]
        row.append(f"{100 * mark['hit_rate']:.4f}")
        if layout:
            row.append(format_size(mark["capacity_bytes"]))
        table.append(row)
    print_numbers(table, indent="  ")
    if "below" in fields:
        typer.echo("with tiers below the pool that take no time, % of the prompt tokens:")
        table = [["pool", "below", "in the pool", "comes back", "together"]]
        for found in fields["below"]:
            shares = found["pool_hit_rate"], sum(found["restored_rate"]), found["hit_rate"]
            row = [found["pool"], found["below"], *(f"{100 * share:.4f}" for share in shares)]
            table.append(row)
        print_numbers(table, indent="  ")
