"""Options that several commands of the experiments have, and what they mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from prefixcache.errors import InvalidRequest

if TYPE_CHECKING:
    from prefixcache_bench.traces import Trace

_SHOWN_BROKEN = 10

Path_ = Annotated[
    str,
    typer.Argument(
        metavar="TRACE",
        help="A trace file (plain or gzip), a folder of kvtrace files, or - for stdin.",
        show_default=False,
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        "-f",
        metavar="FORM",
        help="kvtrace, mooncake, agentic, jsonl or chat. Default: seen from the first line.",
        show_default=False,
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Which workload of a folder of kvtrace files.", show_default=False
    ),
]
SystemPrompts = Annotated[
    str,
    typer.Option(metavar="none|one|four", help="System prompts before a kvtrace's conversations."),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="For chats: tiktoken, tiktoken:ENCODING, or the folder of a Hugging Face tokenizer. "
        "Default: tiktoken.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", show_default=False)]


def load_trace(
    path: str, form: str | None, name: str | None, system: str, tokenizer: str | None
) -> Trace:
    """Read a trace; say on stderr which of its lines are broken.

    Raises:
        InvalidRequest: an option has no such value, or nothing can be read.
    """
    from prefixcache_bench.readers.load import Form, System, load

    if form is not None and form not in list(Form):
        raise InvalidRequest(f"no format {form!r}; there are: {', '.join(Form)}")
    if system not in list(System):
        raise InvalidRequest(f"--system is {', '.join(System)}, not {system!r}")
    trace = load(
        path,
        form=None if form is None else Form(form),
        name=name,
        system=System(system),
        tokenizer=tokenizer,
    )
    for broken in trace.broken[:_SHOWN_BROKEN]:
        typer.echo(f"{trace.name}, {broken}", err=True)
    if trace.broken:
        more = len(trace.broken) - _SHOWN_BROKEN
        typer.echo(
            f"{trace.name}: {len(trace.broken)} broken lines left out"
            + (f" ({more} more not shown)" if more > 0 else ""),
            err=True,
        )
    return trace


def split(text: str, what: str) -> list[str]:
    """Split a list with commas.

    Raises:
        InvalidRequest: it is empty.
    """
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise InvalidRequest(f"give at least one {what}")
    return found


def numbers(text: str, what: str) -> tuple[int, ...]:
    """Read a list of whole numbers with commas.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        return tuple(dict.fromkeys(int(part) for part in split(text, what)))
    except ValueError:
        raise InvalidRequest(f"{text!r} is not a list of {what}s like 1,16,256") from None


def partials(text: str) -> tuple[str, ...]:
    """Read a list of modes of partial reuse.

    Raises:
        InvalidRequest: there is no such mode.
    """
    found = split(text, "mode")
    for one in found:
        if one not in {"off", "blocks", "tails"}:
            raise InvalidRequest(f"--partial is off, blocks or tails, not {one!r}")
    return tuple(dict.fromkeys(found))
