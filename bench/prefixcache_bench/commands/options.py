"""Options that several commands of the experiments have, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prefixcache.errors import InvalidRequest
from prefixcache.texts import many

if TYPE_CHECKING:
    from prefixcache_bench.experiments.traces import Trace

_SHOWN_BROKEN = 10
MOST_LEFT_OUT = 0.5
"""Share of a file's lines that may be left out before a command says so with its exit code."""

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
HashBlock = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        help="For block hashes: tokens that one stands for. Default: by the form (mooncake 512, "
        "with chat_id 16, agentic 64); it must fit the lines.",
        show_default=False,
    ),
]
Layout_ = Annotated[
    str | None,
    typer.Option(
        "--layout",
        metavar="MODEL",
        help="Show and take bytes too: a model's name (llama-3.1-8b), its folder, or "
        "32x8x128:bfloat16.",
        show_default=False,
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        metavar="PER_S",
        help="For chats without times: how many begin a second. Default: 1.",
        show_default=False,
    ),
]
Think = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="For chats without times: mean pause before the next turn. Default: 62.5.",
        show_default=False,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Overwrite files that are there.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", show_default=False)]


HOST_SIZES: Final = (
    "Memory of the host below the pool, with commas, in the forms of --capacity; 0 is none."
)
HostSizes = Annotated[
    str | None, typer.Option("--host", metavar="LIST", help=HOST_SIZES, show_default=False)
]
DiskSizes = Annotated[
    str | None,
    typer.Option("--disk", metavar="LIST", help="A disk below that, likewise.", show_default=False),
]


def load_trace(
    path: str,
    form: str | None,
    name: str | None,
    system: str,
    tokenizer: str | None,
    hash_block: int | None = None,
    rate: float | None = None,
    think: float | None = None,
) -> Trace:
    """Read a trace; say on stderr which of its lines are left out, and what was made up.

    Raises:
        InvalidRequest: an option has no such value, or nothing can be read.
    """
    from prefixcache_bench.experiments.readers.load import Form, System, load

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
        hash_block=hash_block,
        rate=rate,
        think_s=think,
    )
    for broken in trace.broken[:_SHOWN_BROKEN]:
        typer.echo(f"{trace.name}, {broken}", err=True)
    if left_out(trace):
        more = len(trace.broken) - _SHOWN_BROKEN
        shown = f" ({more:,} more not shown)" if more > 0 else ""
        typer.echo(f"{trace.name}: {left_out(trace)}{shown}", err=True)
    for note in [*trace.notes, *trace.not_counted]:
        typer.echo(f"{trace.name}: {note}", err=True)
    return trace


def left_out(trace: Trace) -> str:
    """Say how much of a trace's file its figures leave out; empty if nothing."""
    if not trace.broken:
        return ""
    unit = trace.broken[0].unit
    every = max(trace.num_lines, len(trace.broken))
    behind = ", and all that is behind the last of them" if trace.breaks_off else ""
    share = f"at least {trace.left_out:.1%}" if behind else f"{trace.left_out:.1%}"
    return f"{len(trace.broken):,} of {many(every, unit)} left out ({share}){behind}"


def summary(trace: Trace) -> str:
    """Say what a trace is, and how much of its file it leaves out: beside every figure."""
    text = (
        f"{trace.name}: {many(len(trace), 'request')}, {many(trace.prompt_tokens, 'prompt token')}"
    )
    return "; ".join(part for part in (text, left_out(trace), *trace.not_counted) if part)


def account(trace: Trace) -> dict[str, Any]:
    """Give the same by name, as `--json` prints it."""
    return {
        "broken_lines": len(trace.broken),
        "left_out": round(trace.left_out, 6),
        "breaks_off": trace.breaks_off,
        "notes": [*trace.notes, *trace.not_counted],
    }


def finish(trace: Trace) -> None:
    """End a command: with 1 if its figures leave most of the file out, or nobody knows how much.

    Raises:
        typer.Exit: they do.
    """
    if trace.left_out > MOST_LEFT_OUT:
        typer.echo(
            f"{trace.name}: more than {MOST_LEFT_OUT:.0%} of the file is left out; its figures "
            "say little about it",
            err=True,
        )
        raise typer.Exit(1)
    if trace.breaks_off:
        typer.echo(
            f"{trace.name}: the file breaks off, and how much is behind that nobody knows; the "
            "figures are those of its beginning",
            err=True,
        )
        raise typer.Exit(1)


def refuse_overwriting(paths: Iterable[Path], force: bool) -> None:
    """Refuse to write over files that are there, or into folders that are not.

    Raises:
        InvalidRequest: one is, and `force` is not given; or it can be no file.
    """
    paths = list(paths)
    try:
        nowhere = [path.parent for path in paths if not path.parent.is_dir()]
        there = [str(path) for path in paths if path.exists()]
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"cannot write there: {error}") from None
    if nowhere:
        raise InvalidRequest(f"there is no folder {nowhere[0]} to write into; make it first")
    if there and not force:
        raise InvalidRequest(f"{', '.join(there)}: there already; --force overwrites")


def beside(path: Path, suffix: str) -> Path:
    """Give the file of that name with another suffix.

    Raises:
        InvalidRequest: the path names no file.
    """
    if not path.name:
        raise InvalidRequest(f"{str(path)!r} is the name of no file")
    return path.with_suffix(suffix)


def pictures(path: Path) -> list[Path]:
    """Give the files of a picture."""
    return [beside(path, ".png"), beside(path, ".svg")]


def draw(name: str, path: Path, *what: Any) -> list[Path]:
    """Draw a picture; say on stderr which files it has, or why there is none.

    What is not installed here costs the picture, never the figures.

    Args:
        name: The function of `pictures`.
        path: Where to, without ending.
        what: What the function draws.

    Raises:
        InvalidRequest: the files cannot be written.
    """
    from prefixcache_bench.reports import pictures

    try:
        files: list[Path] = getattr(pictures, name)(path, *what)
    except pictures.PictureMissing as error:
        typer.echo(f"no picture: {error}", err=True)
        return []
    except OSError as error:
        raise InvalidRequest(f"cannot write the picture {path}: {error.strerror}") from None
    for file in files:
        typer.echo(f"wrote {file}", err=True)
    return files


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
