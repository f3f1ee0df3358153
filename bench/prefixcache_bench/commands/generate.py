"""`prefixcache generate`: a seeded workload, as a trace."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixcache.errors import InvalidRequest
from prefixcache_bench.commands import options


def _size(text: str) -> Any:
    return typer.Option(metavar="N", help=text)


def generate(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND", help="chats, few-shot, agents, rag or tree.", show_default=False
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="Where to; - is stdout.")
    ] = "-",
    count: Annotated[int, _size("Chats, questions, tasks or problems.")] = 200,
    seed: Annotated[int, _size("The same seed gives the same trace.")] = 0,
    arrival: Annotated[
        str, typer.Option(metavar="poisson|uniform|bursts", help="How they arrive.")
    ] = "poisson",
    rate: Annotated[float, typer.Option(metavar="PER_S", help="How many a second.")] = 1.0,
    think: Annotated[float, typer.Option(metavar="SECONDS", help="Mean pause of a user.")] = 20.0,
    turns: Annotated[int, _size("Mean turns of a chat or an agent; depth of a tree.")] = 4,
    prefixes: Annotated[int, _size("System prompts, or sets of examples.")] = 4,
    prefix_tokens: Annotated[int, _size("Mean tokens of one.")] = 800,
    question_tokens: Annotated[int, _size("Mean tokens of a question.")] = 60,
    answer_tokens: Annotated[int, _size("Mean tokens of an answer.")] = 200,
    documents: Annotated[int, _size("Documents there are (rag).")] = 100,
    document_tokens: Annotated[int, _size("Mean tokens of a document (rag).")] = 400,
    picked: Annotated[int, _size("Documents of a question, in any order (rag).")] = 4,
    fan_out: Annotated[int, _size("Agents of a task; branches of a tree's node.")] = 4,
    popularity: Annotated[float, typer.Option(metavar="ZIPF", help="0: all alike.")] = 1.0,
    spread: Annotated[float, typer.Option(metavar="SIGMA", help="0: all as long.")] = 0.6,
    force: options.Force = False,
    packed: Annotated[
        bool, typer.Option("--packed", help="Tokens as base64: smaller, faster to read.")
    ] = False,
) -> None:
    """Generate a seeded workload: chats, few-shot, agents, rag or tree, as lines of JSON.

    Example: prefixcache generate rag --count 500 --documents 40 --packed -o rag.jsonl
    """
    from prefixcache_bench.experiments import generators
    from prefixcache_bench.experiments.readers import token_lines

    if kind not in list(generators.Kind):
        raise InvalidRequest(f"no workload {kind!r}; there are: {', '.join(generators.Kind)}")
    if arrival not in list(generators.Arrival):
        raise InvalidRequest(f"--arrival is {', '.join(generators.Arrival)}, not {arrival!r}")
    shape = generators.Shape(
        count=count,
        seed=seed,
        arrival=generators.Arrival(arrival),
        rate=rate,
        think_s=think,
        turns=turns,
        prefixes=prefixes,
        prefix_tokens=prefix_tokens,
        question_tokens=question_tokens,
        answer_tokens=answer_tokens,
        documents=documents,
        document_tokens=document_tokens,
        picked=picked,
        fan_out=fan_out,
        popularity=popularity,
        spread=spread,
    )
    trace = generators.generate(generators.Kind(kind), shape)
    if out == "-":
        token_lines.write(trace, sys.stdout, packed=packed)
        return
    options.refuse_overwriting([Path(out)], force)
    try:
        with Path(out).open("w") as file:
            token_lines.write(trace, file, packed=packed)
    except OSError as error:
        raise InvalidRequest(f"cannot write {out}: {error.strerror}") from None
    typer.echo(f"{out}: {len(trace):,} requests, {trace.prompt_tokens:,} prompt tokens", err=True)
