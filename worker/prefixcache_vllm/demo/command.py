"""`python -m prefixcache_vllm.demo`: the command."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefixcache.errors import CacheError
from prefixcache.plain_json import json_text
from prefixcache.run_folder import RunFolder
from prefixcache_vllm.demo import ladder, runner, tiny, verdict
from prefixcache_vllm.demo.environments import why_not
from prefixcache_vllm.demo.servers import Model
from prefixcache_worker.demo import chats, picture, report, summary
from prefixcache_worker.demo.ending import USAGE, WRONG, play
from prefixcache_worker.demo.live import open_console, open_view

PYTHON: Final = ".venv-vllm/bin/python"
QUICK_TOKENS: Final = 12
QUICK_CHUNK: Final = 8


def demo(
    *,
    python: Annotated[
        str,
        typer.Option(
            envvar="PREFIXCACHE_VLLM_PYTHON", help="Of an environment with vLLM and prefixcache."
        ),
    ] = PYTHON,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model with random weights, 9 chats of 2 turns.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="float32: token for token; bfloat16: ties are shown.")
    ] = "float32",
    to: Annotated[
        Path, typer.Option("--report", help="Where the JSON goes; the picture goes next to it.")
    ] = Path("out/vllm.json"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report on standard output.")
    ] = False,
) -> None:
    """Show unmodified vLLM on one pool: three engines share what each computes, answers are exact.

    Starts a service and three servers, plays chats that move between them over HTTP, kills an
    engine in mid-prefill and then the service, and compares every answer with a plain vLLM's.
    Exit code 0 only if all of it held.
    """
    console = open_console(stderr=as_json)
    missing = why_not(python)
    if missing:
        console.print(Text(missing, style="bold red"))
        raise typer.Exit(USAGE)
    with RunFolder("prefixcache-vllm-model-") as folder:
        try:
            setup = _setup(python, dtype, folder, quick=quick)
        except (CacheError, OSError, ValueError) as error:
            console.print(Text(f"cannot make the demo's model: {error}", style="bold red"))
            raise typer.Exit(USAGE) from None
        result = run_and_report(console, setup, to)
    if as_json:
        typer.echo(json_text(result, indent=1))
    if not all(promise["held"] for promise in result["promises"]):
        raise typer.Exit(WRONG)


def run_and_report(console: Console, setup: runner.Setup, to: Path) -> dict[str, Any]:
    """Run the demo, show it, write report and picture; give the report.

    Raises:
        typer.Exit: the demo could not be run (1), or was told to end (128 + the signal).
    """
    view = open_view(console, setup.engines, setup.workload.num_requests)
    outcome = play(console, view, lambda: runner.execute(setup, view))
    found = report.header(setup.model.folder) | report.figures(
        outcome.shared, outcome.unshared, outcome.verdict
    )
    found["dtype"] = setup.model.dtype
    found["first_tokens"] = ladder.figures(outcome.ladders)
    promises = verdict.judge(outcome, found, may_be_late=setup.may_be_late)
    found["promises"] = verdict.as_json(promises)
    found["summary"] = verdict.last_line(promises, found)
    report.write(to, found)
    drawing = to.with_suffix(".png")
    picture.draw(drawing, outcome.shared, outcome.unshared, found)
    if console.is_terminal:
        summary.show_requests(console, outcome.shared)
    summary.show_totals(console, outcome.shared, outcome.verdict, found)
    for difference in outcome.outage_verdict.differences:
        console.print(Text(str(difference), style="yellow" if difference.tie else "bold red"))
    console.print()
    console.print(_first_tokens(found["first_tokens"]))
    console.print()
    console.print(_promises(promises))
    console.print()
    console.print(f"report {to}, picture {drawing}", soft_wrap=True)
    style = "bold green" if all(promise.held for promise in promises) else "bold red"
    console.print(Text(found["summary"], style=style), soft_wrap=True)
    return found


def _setup(python: str, dtype: str, folder: Path, *, quick: bool) -> runner.Setup:
    from prefixcache_worker import smollm2

    real = smollm2.folder()
    path = tiny.write(folder / "tiny-llama", real) if quick else real
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path))
    workload = chats.load()
    model = Model(os.path.abspath(python), str(path), dtype)  # noqa: PTH100 - a link stays one
    setup = runner.Setup(workload, tokenizer, frozenset({tokenizer.eos_token_id} - {None}), model)
    if quick:
        return replace(
            setup,
            workload=tiny.chats(workload),
            # Short steps, for the same reason as the longer prompt.
            model=replace(model, memory="512MiB", chunk=QUICK_CHUNK),
            answer_tokens=QUICK_TOKENS,
            ladders=runner.QUICK_LADDERS,
            may_be_late=True,
        )
    return setup


def _first_tokens(figures: dict[str, Any]) -> Table:
    """Lay the ladders' figures out as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("one request at a time", style="bold", no_wrap=True)
    for name in ("requests", "prompt tokens", "computed", "first token", "of cold"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind, row in figures.items():
        if row["requests"]:
            table.add_row(
                {
                    ladder.COLD: "cold: computed by the engine",
                    ladder.OTHERS: "another engine's, read in place",
                    ladder.OWN: "its own, read in place",
                }[kind],
                str(row["requests"]),
                f"{row['prompt_tokens']:,.0f}",
                f"{row['computed']:,.0f}",
                f"{row['first_token_ms']:,.0f} ms",
                f"{row['of_cold']:.2f}",
            )
    return table


def _promises(promises: Sequence[verdict.Held]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(style="bold")
    table.add_column()
    for promise in promises:
        mark = Text("held", style="green") if promise.held else Text("BROKEN", style="bold red")
        table.add_row(mark, promise.name, Text(promise.seen, style="dim"))
    return table
