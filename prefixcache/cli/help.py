"""Help in plain text, in sections: it is there before typer's own drawing of it has been imported.

An option's `rich_help_panel` names its section, as it does in typer's drawing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

if TYPE_CHECKING:
    from typer._click import HelpFormatter

Row = tuple[str | None, tuple[str, str]]
"""A section, and in it a name and what is said of it."""


class PlainCommand(TyperCommand):
    """A command whose help is plain."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"rich_markup_mode": None})

    def format_options(self, ctx: Any, formatter: HelpFormatter) -> None:
        """Write the arguments and options."""
        write_sections(formatter, parameters(self, ctx))


def parameters(command: Any, ctx: Any) -> Iterable[Row]:
    """Give the arguments and options of a command, each under its section."""
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None:
            usual = "Arguments" if param.param_type_name == "argument" else "Options"
            yield getattr(param, "rich_help_panel", None) or usual, record


def write_sections(formatter: HelpFormatter, rows: Iterable[Row]) -> None:
    """Write rows by section, the sections in the order in which they first come."""
    sections: dict[str | None, list[tuple[str, str]]] = {}
    for section, row in rows:
        sections.setdefault(section, []).append(row)
    for section, found in sections.items():
        with formatter.section(section or "Options"):
            formatter.write_dl(found)
