"""`prefixcache memory`: what KV memory is used for, and what sharing blocks saves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixcache.cli import view
from prefixcache.errors import InvalidRequest
from prefixcache.texts import many
from prefixcache_bench.commands import options
from prefixcache_bench.commands.table import print_numbers
from prefixcache_bench.experiments.progress import Progress

if TYPE_CHECKING:
    from prefixcache_bench.experiments.memory import Job

PUBLISHED = {
    "reserve-max": 20.4,
    "reserve-power-of-two": 26.8,
    "oracle": 38.2,
    "paged, blocks of 16": 96.3,
}
"""Useful share of KV memory, in percent, as the paper on paged attention gives it (ShareGPT)."""
PUBLISHED_SAVINGS = {
    "parallel sampling": "6-10 (Alpaca), 16-30 (ShareGPT)",
    "beam search": "38-55 (Alpaca), 44-66 (ShareGPT)",
}
"""Blocks saved with 2 to 6 sequences, in percent, from the same paper."""
_WIDTHS = (2, 4, 6)


def memory(
    path: options.Path_,
    form: options.Format = None,
    name: options.Name = None,
    system: options.SystemPrompts = "none",
    tokenizer: options.Tokenizer = None,
    hash_block: options.HashBlock = None,
    rate: options.Rate = None,
    think: options.Think = None,
    slots: Annotated[
        int, typer.Option(metavar="TOKENS", help="KV memory, in tokens: a power of two.")
    ] = 16384,
    longest: Annotated[
        int, typer.Option(metavar="TOKENS", help="Longest sequence; longer ones are left out.")
    ] = 2048,
    block_size: Annotated[
        str, typer.Option(metavar="LIST", help="Tokens per block, with commas.")
    ] = "1,4,16,64,256",
    requests: Annotated[int, typer.Option(metavar="N", help="Requests to serve.")] = 2000,
    branched: Annotated[
        int, typer.Option(metavar="N", help="Requests to sample and to beam-search.")
    ] = 40,
    history: Annotated[
        bool,
        typer.Option("--history", help="Prompts with the chat so far, not each turn alone."),
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the shares, as PNG and SVG.", show_default=False),
    ] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Account for KV memory: contiguous against paged, and what forks save.

    A saturated server is simulated step by step with the service's own block pool; parallel
    sampling and beam search run on the cache's own forks.

    Example: prefixcache memory chats.jsonl --block-size 1,16,256 --picture memory
    """
    from prefixcache_bench.experiments.memory import Reservation, jobs_of
    from prefixcache_bench.reports.provenance import provenance

    sizes = options.numbers(block_size, "block size")
    if picture is not None:
        options.refuse_overwriting(options.pictures(picture), force)
    trace = options.load_trace(path, form, name, system, tokenizer, hash_block, rate, think)
    jobs = jobs_of(trace, longest=longest, history=history, limit=requests)
    refuse_what_never_fits(jobs, slots, longest, sizes)
    steps = len(Reservation) + len(sizes) + 2 * len(_WIDTHS)
    with Progress("memory", steps, quiet=as_json) as progress:
        shares = account(jobs, slots, longest, sizes, progress)
        if not all(row["full_steps"] for row in shares):
            refuse_emptiness(jobs, slots, longest, sizes, shares)
        savings = save(jobs[:branched], progress)
    if picture is not None:
        title = f"{trace.name}: {slots:,} slots, {len(jobs):,} requests"
        options.draw("draw_memory", picture, title, shares)
    mean_prompt = sum(job.prompt for job in jobs) / len(jobs)
    mean_answer = sum(job.answer for job in jobs) / len(jobs)
    if as_json:
        view.print_json(
            {
                "trace": trace.name,
                "requests": len(jobs),
                "slots": slots,
                "mean_prompt_tokens": round(mean_prompt, 1),
                "mean_answer_tokens": round(mean_answer, 1),
                "shares": shares,
                "savings": savings,
                **options.account(trace),
                "run": provenance(),
            }
        )
        options.finish(trace)
        return
    typer.echo(
        f"{trace.name}: {len(jobs):,} requests of {mean_prompt:.0f} + {mean_answer:.0f} tokens on "
        f"average, {slots:,} slots, at most {longest:,} tokens a sequence"
    )
    print_numbers(share_table(shares), indent="  ")
    typer.echo(f"\nblocks of 16 saved by forks, %, {min(branched, len(jobs))} requests")
    print_numbers(saving_table(savings), indent="  ")
    if trace.broken or trace.not_counted:
        typer.echo(f"of {options.summary(trace)}")
    options.finish(trace)


def refuse_what_never_fits(
    jobs: list[Job], slots: int, longest: int, block_sizes: tuple[int, ...]
) -> None:
    """Refuse a memory that cannot hold one sequence, or one block.

    Raises:
        InvalidRequest: it cannot; the message says which option asks for more.
    """
    reserved = 1 << max(0, longest - 1).bit_length()
    if reserved > slots:
        most = max(job.total for job in jobs)
        raise InvalidRequest(
            f"{slots:,} slots do not hold the {reserved:,} that are reserved for a sequence of "
            f"--longest {longest:,}; the longest there is has {most:,}"
        )
    if max(block_sizes) > slots:
        raise InvalidRequest(
            f"{slots:,} slots hold no block of {max(block_sizes):,} (--block-size)"
        )


def refuse_emptiness(
    jobs: list[Job],
    slots: int,
    longest: int,
    block_sizes: tuple[int, ...],
    shares: list[dict[str, Any]],
) -> None:
    """Refuse to account for a memory that is never full, and name one that is.

    Raises:
        InvalidRequest: always; the message says what to do.
    """
    idle = ", ".join(row["allocation"] for row in shares if not row["full_steps"])
    least = max(longest, *(job.total for job in jobs), *block_sizes)
    fewer = slots // 2
    while fewer >= least:
        with Progress("memory", len(shares), quiet=True) as progress:
            if all(
                row["full_steps"] for row in account(jobs, fewer, longest, block_sizes, progress)
            ):
                break
        fewer //= 2
    advice = f"use --slots {fewer}" if fewer >= least else "give more requests"
    if fewer < least and (short := max(job.total for job in jobs)) < longest:
        advice += f", or say --longest {short}, which is the longest there is"
    raise InvalidRequest(
        f"{many(len(jobs), 'request')} never fill {slots:,} slots with {idle}, so there is no "
        f"full memory to account for; {advice}"
    )


def account(
    jobs: list[Job],
    slots: int,
    longest: int,
    block_sizes: tuple[int, ...],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Give the shares of memory, a row for each way of allocating."""
    from prefixcache_bench.experiments.memory import Reservation, contiguous, paged

    found = []
    for way in Reservation:
        found.append((way.value, contiguous(jobs, slots, way, longest)))
        progress.advance()
    for size in block_sizes:
        found.append((f"paged, blocks of {size}", paged(jobs, slots, size)))
        progress.advance()
    return [
        {
            "allocation": name,
            "useful_percent": round(100 * shares.useful, 2),
            "reserved_percent": round(100 * shares.reserved, 2),
            "internal_percent": round(100 * shares.internal, 2),
            "external_percent": round(100 * shares.external, 2),
            "running": round(shares.running, 1),
            "full_steps": shares.steps,
            "published_useful_percent": PUBLISHED.get(name),
        }
        for name, shares in found
    ]


def save(jobs: list[Job], progress: Progress) -> list[dict[str, Any]]:
    """Give the blocks that forks save, a row for each way of branching."""
    from prefixcache_bench.experiments.branching import beam_search, parallel_sampling

    rows = []
    for name, run in (("parallel sampling", parallel_sampling), ("beam search", beam_search)):
        for width in _WIDTHS:
            saved = run(jobs, width, 16)
            progress.advance()
            rows.append(
                {
                    "branching": name,
                    "sequences": width,
                    "saved_percent": round(100 * saved, 2),
                    "published_percent": PUBLISHED_SAVINGS[name],
                }
            )
    return rows


def share_table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Lay the shares out as a table, beside the published figures."""
    names = ("useful", "reserved", "internal", "external")
    table: list[tuple[str, ...]] = [("% of KV memory", *names, "running", "published useful")]
    for row in rows:
        published = row["published_useful_percent"]
        cells = [f"{row[f'{name}_percent']:.1f}" for name in names]
        cells += [f"{row['running']:.1f}", "" if published is None else f"{published:.1f}"]
        table.append((row["allocation"], *cells))
    return table


def saving_table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Lay the savings out as a table, beside the published figures."""
    table: list[tuple[str, ...]] = [
        ("branching", *(str(width) for width in _WIDTHS), "published, 2 to 6")
    ]
    for name, published in PUBLISHED_SAVINGS.items():
        saved = [f"{row['saved_percent']:.1f}" for row in rows if row["branching"] == name]
        table.append((name, *saved, published))
    return table
