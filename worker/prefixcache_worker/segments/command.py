"""The command `prefixcache verify-segments`.  Torch is imported when it is called."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def verify_segments(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face folder or id, or smollm2.")
    ],
    texts: Annotated[
        Path | None,
        typer.Option("--texts", metavar="FILE", help="Other texts than ours: docs/segments.md."),
    ] = None,
    threshold: Annotated[
        float,
        typer.Option(min=0.0, metavar="NATS", help="Largest mean divergence of a kind of text."),
    ] = 0.01,
    tokens: Annotated[
        int, typer.Option(min=1, max=1024, metavar="N", help="Tokens of an answer, at most.")
    ] = 24,
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="Cores to compute on.")] = 1,
    to: Annotated[
        Path | None,
        typer.Option(
            "--certificate", metavar="FILE", help="Where it goes; by default to this user's state."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate.")] = False,
) -> None:
    """Measure what reusing tokens at other places does to a model's answers: a certificate.

    Exit code 0 if some policy that spares work stays within the threshold with every kind of text.
    Needs no service.  Minutes; nothing is written before the end.

    Example: prefixcache verify-segments smollm2
    """
    # Before torch is imported: its thread pools read this once.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from prefixcache.plain_json import json_text
    from prefixcache_worker.segments import certificate as certificates
    from prefixcache_worker.segments import texts as all_texts
    from prefixcache_worker.segments.moved import POLICIES

    chosen = all_texts.load(texts)  # before the model: what is wrong with them is told at once
    loaded, angles = certificates.load(model, threads)
    with _Steps(len(chosen.all) * len(POLICIES)) as steps:
        made = certificates.certify(
            loaded, angles, chosen, threshold=threshold, num_answer=tokens, on_step=steps.tell
        )
    place = certificates.keep(made, to)
    if as_json:
        typer.echo(json_text(made, indent=1))
    else:
        typer.echo("\n".join([*certificates.lines_of(made), f"certificate {place}"]))
    if not made["reached_by"]:
        raise typer.Exit(1)


class _Steps:
    """Progress on stderr: a bar on a terminal, else a line a text."""

    def __init__(self, total: int) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True, quiet=not sys.stderr.isatty()),
            transient=True,
        )
        self._task = self._bar.add_task("computing", total=total)
        self._last: Any = None

    def __enter__(self) -> _Steps:
        self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.stop()

    def tell(self, text: Any, policy: object) -> None:
        """Count a step; name the text that it is of."""
        self._bar.update(self._task, advance=1, description=f"{text.kind}: {text.name}")
        if text is not self._last and not sys.stderr.isatty():
            print(f"computing {text.kind}: {text.name}", file=sys.stderr, flush=True)  # noqa: T201
        self._last = text
