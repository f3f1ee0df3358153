"""`prefixcache demo`: the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.text import Text

from prefixcache.errors import CacheError
from prefixcache.plain_json import json_text
from prefixcache_worker.demo import chats, picture, report, runner, summary
from prefixcache_worker.demo.ending import USAGE, WRONG, play
from prefixcache_worker.demo.live import open_console, open_view
from prefixcache_worker.demo.transcript import Transcript

TOKENS: Final = 24
QUICK_TOKENS: Final = 16
"""How long answers may become."""


def demo(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="9 chats of 2 turns: under 90 s.")] = False,
    workers: Annotated[int, typer.Option(min=1, max=16, help="Worker processes.")] = 3,
    model: Annotated[
        str, typer.Option(help="Hugging Face path or id; by default SmolLM2-135M-Instruct.")
    ] = "",
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens",
            help="Compare tokens, and read once a step what sequences share.  Else bits are "
            "compared, where the model's network allows it.",
        ),
    ] = False,
    to: Annotated[
        Path, typer.Option("--report", help="Where the JSON goes; the picture goes next to it.")
    ] = Path("out/demo.json"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report on standard output.")
    ] = False,
) -> None:
    """Show the whole product on a real model, and that its answers are exact.

    Starts the service and the workers, plays chats that share system prompts, kills a worker in
    mid-prefill, then plays the same chats without any cache and compares every answer, bit for bit
    where the model's network computes alike in any company.  Then a worker is killed in
    mid-sentence, and another one goes on.  At the end some of it is asked again where the pool is
    too small: what was evicted comes back from a disk, after a restart, too, and what was computed
    serves a second machine through a Valkey server.
    Exit code 0 only if all answers are identical.
    """
    console = open_console(stderr=as_json)
    try:
        setup = _setup(model, quick=quick, num_workers=workers, tokens=tokens)
    except (CacheError, OSError, ValueError) as error:
        console.print(Text(f"cannot use this model: {error}", style="bold red"))
        raise typer.Exit(USAGE) from None
    result = run_and_report(console, setup, to)
    if as_json:
        typer.echo(json_text(result, indent=1))
    sentence = result["sentence"]
    has_broken_off = sentence is not None and not sentence["survived"]
    has_lost = not result["below"]["kept"]
    if not result["identical"] or result["pool_blocks_leaked"] or has_broken_off or has_lost:
        raise typer.Exit(WRONG)


def run_and_report(console: Console, setup: runner.Setup, to: Path) -> dict[str, Any]:
    """Run the demo, show it, write report and picture; give the report.

    Raises:
        typer.Exit: the demo could not be run (1), or was told to end (128 + the signal).
    """
    view = open_view(console, setup.workers, setup.workload.num_requests)
    outcome = play(console, view, lambda: runner.execute(setup, view))
    result = report.header(setup.model) | report.figures(
        outcome.shared, outcome.unshared, outcome.verdict, outcome.sentence, outcome.below
    )
    report.write(to, result)
    drawing = to.with_suffix(".png")
    picture.draw(drawing, outcome.shared, outcome.unshared, result)
    if console.is_terminal:
        summary.show_requests(console, outcome.shared)
    summary.show_totals(
        console, outcome.shared, outcome.verdict, result, outcome.sentence, outcome.below
    )
    console.print(f"report {to}, picture {drawing}", soft_wrap=True)
    return result


def _setup(model: str, *, quick: bool, num_workers: int, tokens: bool) -> runner.Setup:
    """Prepare what is played: the model's folder (converted if need be), the chats as tokens."""
    from prefixcache_worker import smollm2
    from prefixcache_worker.mapped import may_pack

    path = str(smollm2.folder()) if model in ("", smollm2.NAME) else model
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise ValueError(f"{path} has no chat template; the demo needs a model made for chats")
    workload = chats.load()
    if quick:
        workload = workload.quick()
    stop = frozenset({tokenizer.eos_token_id} - {None})
    transcripts = {chat.id: Transcript(chat, tokenizer, stop) for chat in workload.chats}
    names = tuple(f"w{i + 1}" for i in range(num_workers))
    return runner.Setup(
        workload,
        transcripts,
        path,
        names,
        answer_tokens=QUICK_TOKENS if quick else TOKENS,
        bits=not tokens and may_pack(path),
    )
