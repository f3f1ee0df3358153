"""All commands, imported when they are called, not before: ours, and those of other packages.

A package adds `NAME = "module:command"` to the group `prefixcache.commands`; the command is a
function with typer's annotations, or a `typer.Typer`; a function may have `context_settings`, for
one that hands arguments on.  Ours are named in `OWN` in the same way.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final

import typer
from typer.core import TyperGroup

from prefixcache import __version__, core_build
from prefixcache.cli import streams
from prefixcache.cli.help import PlainCommand, parameters, write_sections
from prefixcache.extras import how_to_install

GROUP = "prefixcache.commands"

OWN: Final = {
    name: EntryPoint(name, f"prefixcache.cli.{place}", GROUP)
    for name, place in {
        "serve": "serve:serve",
        "stat": "stat:stat",
        "top": "top:top",
        "lookup": "lookup:lookup",
        "explain": "explain:explain",
        "encode": "encode:encode",
        "tree": "tree:tree",
        "doctor": "doctor:doctor",
        "watch": "watch:watch",
        "what-if": "whatif:what_if",
        "reset": "reset:reset",
        "pin": "pin:pin",
        "unpin": "pin:unpin",
        "quota": "quota:quota",
        "token": "token:token",
    }.items()
}
"""This package's commands, in the order in which help shows them."""

_JSON: Final = "prefixcache.json"
"""Whether `--json` was given before the command."""

_called: list[EntryPoint] = []
"""The plug-in that this process runs, for the message when a module of its extra is missing."""


@cache
def found() -> dict[str, EntryPoint]:
    """Give the plugged-in commands by name, unimported."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def missing(error: ModuleNotFoundError) -> str:
    """Say what to install when a plug-in lacks a module; empty if no plug-in was called."""
    module = (error.name or "").partition(".")[0]
    if not _called or not module:
        return ""
    entry = _called[0]
    package = entry.dist.name if entry.dist else "prefixcache"
    how = how_to_install(entry.name, package, module=module)
    return f"{entry.name} needs {module}, which is not installed: {how}"


def summary(entry: EntryPoint) -> str:
    """Read the first line of a command's docstring from its source, without importing it.

    By the shape that our files have: parsing two dozen takes longer than all the rest of `--help`.
    Files of another shape are parsed.
    """
    top, *rest = entry.module.split(".")
    spec = importlib.util.find_spec(top)
    fallback = f"(from {top})"
    if spec is None or not spec.submodule_search_locations:
        return fallback
    path = Path(next(iter(spec.submodule_search_locations)), *rest)
    for source in (path.with_suffix(".py"), path / "__init__.py"):
        if not source.is_file():
            continue
        shape = rf'^def {entry.attr}\((?:(?!\ndef ).)*?\) -> \w+:\n    """(.+?)(?:"""|\n)'
        text = source.read_text(encoding="utf-8")
        if line := re.search(shape, text, re.DOTALL | re.MULTILINE):
            return line[1]
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
                return (ast.get_docstring(node) or fallback).partition("\n")[0]
    return fallback


class Placeholder(PlainCommand):
    """Stands for a command in the list of all; becomes the real one when it is called."""

    def __init__(self, entry: EntryPoint) -> None:
        panel = None if entry.name in OWN else "Plug-ins"
        super().__init__(name=entry.name, help=summary(entry), rich_help_panel=panel)
        self._entry = entry

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Import the command and hand over to it."""
        if self._entry.name not in OWN:
            _called.append(self._entry)
        command = self._entry.load()
        if not hasattr(command, "make_context"):
            if not isinstance(command, typer.Typer):
                # Completion is an option of `prefixcache`, not of each of its commands.
                function, command = (
                    command,
                    typer.Typer(
                        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
                    ),
                )
                settings = getattr(function, "context_settings", None)
                command.command(self._entry.name, cls=PlainCommand, context_settings=settings)(
                    function
                )
            command = typer.main.get_command(command)
        return command.make_context(*args, **kwargs)


class PluginGroup(TyperGroup):
    """A group of commands that plug-ins can join; its own commands win."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the options of `prefixcache` itself; `--json` goes on to the command."""
        count = next((at for at, one in enumerate(args) if one != "--json"), len(args))
        if count:
            ctx.meta[_JSON], args = True, args[count:]
        for param in self.get_params(ctx):
            # To convert what is not a flag that was given, typer loads pydantic, which takes longer
            # than everything else that `--help` needs.  Ours are flags, and text, which stays.
            if getattr(param, "is_flag", False):
                if param.default is None:
                    param.default = False
            else:
                param.process_value = _as_it_is  # type: ignore[method-assign]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options of `prefixcache` itself, and then the commands."""
        write_sections(formatter, parameters(self, ctx))
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write what each command is for, ours before those that plug in."""
        commands = [self.get_command(ctx, name) for name in self.list_commands(ctx)]
        rows = [(one.rich_help_panel or "Commands", (one.name, one.help)) for one in commands]
        write_sections(formatter, rows)

    def list_commands(self, ctx: Any) -> list[str]:
        """Give the names of all commands, in the order in which help shows them."""
        return [*OWN, *sorted(set(found()) - set(OWN))]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that is called; if there is none, name those that it may have been.

        `help COMMAND` and `version` are as good as the options of these names.
        """
        if args[0] == "help" and args[1:]:
            args = [args[1], "--help"]
        elif args[0] in ("help", "version"):
            typer.echo(ctx.get_help() if args[0] == "help" else version())
            raise typer.Exit
        if ctx.meta.get(_JSON):
            args = [args[0], "--json", *args[1:]]
        if self.get_command(ctx, args[0]) is None:  # then typer looks for near misses in these
            self.commands = {one: self.get_command(ctx, one) for one in self.list_commands(ctx)}
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Give a command, as a placeholder."""
        entry = OWN.get(cmd_name) or found().get(cmd_name)
        return Placeholder(entry) if entry else None


def version() -> str:
    """Give the version with what the core runs as; tell what to do if that is not what is here."""
    core = core_build.kind()
    if core == core_build.STALE:
        streams.say(f"the core is {core} than those beside it: {core_build.ADVICE}")
    return f"prefixcache {__version__} (core: {core})"


def _as_it_is(ctx: Any, value: Any) -> Any:
    return value
