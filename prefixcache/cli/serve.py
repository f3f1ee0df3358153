"""`prefixcache serve`: start the service in the foreground.

Its flags are the fields of `ServeSettings`: type, default, limits and help are said there.
"""

from __future__ import annotations

import contextlib
from inspect import Parameter, Signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from prefixcache.cli import streams
from prefixcache.cli.codes import EXIT_REFUSED
from prefixcache.config import Option, ServeSettings, format_size, load
from prefixcache.errors import NotFound, PoolExhausted, ServiceUnavailable


def serve(**flags: Any) -> None:
    """Start the service: it owns the pool and lends its blocks to workers.

    Every option is also an environment variable, PREFIXCACHE_MEMORY and so on; options win.  The
    first Ctrl-C (or SIGTERM) lets leases come back before it ends, the second ends it at once.

    Example: prefixcache serve --memory 8GiB --model /models/my-model
    """
    # Imported here: help is shown without the service and its libraries.
    from prefixcache.service.server import run

    try:
        raise typer.Exit(run(load(flags), _announce))
    except (ServiceUnavailable, PoolExhausted, NotFound) as error:
        streams.say(str(error))
        raise typer.Exit(EXIT_REFUSED) from None


def _announce(line: str) -> None:
    with contextlib.suppress(OSError):  # who reads it may go, and the service stays
        typer.echo(line)


def _flag(name: str, field: FieldInfo, hint: Any) -> Parameter:
    option = next(one for one in field.metadata if isinstance(one, Option))
    shown = typer.Option(
        help=option.text + _default(field, option),
        metavar=option.metavar,
        rich_help_panel=option.section,
        show_default=False,
    )
    is_read = any(isinstance(one, BeforeValidator) for one in field.metadata)
    # A path is read as a text, so that an empty one is known for what it is.
    plain = {int, float, bool} & {hint, *get_args(hint)} if not is_read else None
    kind: Any = list[str] if get_origin(hint) is list else plain.pop() if plain else str
    # None: not given, so that a variable of the environment counts.
    annotation = Annotated[kind | None, shown]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _default(field: FieldInfo, option: Option) -> str:
    value = field.default
    if value is None or value == []:
        return f" Default: {option.unset}." if option.unset else ""
    if isinstance(value, bool):
        value = "on" if value else "off"
    elif option.metavar == "SIZE":
        value = format_size(value).replace(" ", "")
    elif isinstance(value, float):
        value = f"{value:.15g}"
    return f" Default: {value}."


_hints = get_type_hints(ServeSettings)
serve.__signature__ = Signature(  # type: ignore[attr-defined]
    [_flag(name, field, _hints[name]) for name, field in ServeSettings.model_fields.items()]
)
