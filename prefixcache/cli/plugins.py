"""Commands of other packages: found by entry point, imported when they are called, not before.

A package adds `NAME = "module:command"` to the group `prefixcache.commands`; the command is a
function with typer's annotations, or a `typer.Typer`.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

GROUP = "prefixcache.commands"

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
    extras = (entry.dist.metadata.get_all("Provides-Extra") if entry.dist else None) or []
    extra = f"[{entry.name}]" if entry.name in extras else ""
    return (
        f"{entry.name} needs {module}, which is not installed. "
        f"Install it with: pip install '{package}{extra}'"
    )


def summary(entry: EntryPoint) -> str:
    """Read the first line of a command's docstring from its source, without importing it."""
    top, *rest = entry.module.split(".")
    spec = importlib.util.find_spec(top)
    fallback = f"(from {top})"
    if spec is None or not spec.submodule_search_locations:
        return fallback
    path = Path(next(iter(spec.submodule_search_locations)), *rest)
    for source in (path.with_suffix(".py"), path / "__init__.py"):
        if not source.is_file():
            continue
        for node in ast.parse(source.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
                return (ast.get_docstring(node) or fallback).partition("\n")[0]
    return fallback


class Placeholder(TyperCommand):
    """Stands for a plug-in in the list of commands; becomes the real one when it is called."""

    def __init__(self, entry: EntryPoint) -> None:
        super().__init__(name=entry.name, help=summary(entry), rich_help_panel="Plug-ins")
        self._entry = entry

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Import the plug-in and hand over to it."""
        _called.append(self._entry)
        command = self._entry.load()
        if not hasattr(command, "make_context"):
            if not isinstance(command, typer.Typer):
                # Completion is an option of `prefixcache`, not of each of its commands.
                function, command = (
                    command,
                    typer.Typer(add_completion=False, pretty_exceptions_enable=False),
                )
                command.command(self._entry.name)(function)
            command = typer.main.get_command(command)
        return command.make_context(*args, **kwargs)


class PluginGroup(TyperGroup):
    """A group of commands that plug-ins can join; its own commands win."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the options of `prefixcache` itself."""
        for param in self.get_params(ctx):
            # An absent flag is False, not None: for None, typer loads pydantic to convert it,
            # which takes longer than everything else that `--help` needs.
            if getattr(param, "is_flag", False) and param.default is None:
                param.default = False
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        """Give the names of all commands, in the order in which help shows them."""
        own = super().list_commands(ctx)
        return [*own, *sorted(set(found()) - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Give a command; a plug-in only as a placeholder."""
        command = super().get_command(ctx, cmd_name)
        if command is None and (entry := found().get(cmd_name)):
            return Placeholder(entry)
        return command
