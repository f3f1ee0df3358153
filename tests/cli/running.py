"""Commands as users run them: in another process, with what they print and their exit code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

from prefixcache.cli.main import main
from service.service_process import command, environment


@dataclass
class Told:
    code: int
    out: str
    err: str

    @property
    def fields(self) -> Any:
        return json.loads(self.out)


@dataclass
class At:
    """A service, and commands that speak to it."""

    target: str

    def run(self, *arguments: str, given: str = "", **extra: str) -> Told:
        return run(*arguments, "--connect", self.target, given=given, **extra)

    def call(self, *arguments: str, given: str | bytes = "", **extra: str) -> Told:
        return call(*arguments, "--connect", self.target, given=given, **extra)


def run(*arguments: str, given: str = "", **extra: str) -> Told:
    told = subprocess.run(
        command(*arguments),
        input=given,
        capture_output=True,
        text=True,
        env=environment() | {"COLUMNS": "200"} | extra,
        check=False,
    )
    assert "Traceback" not in told.stderr, told.stderr
    return Told(told.returncode, told.stdout, told.stderr)


def call(*arguments: str, given: str | bytes = "", **extra: str) -> Told:
    """The same in this process, which saves the start: through `main`, which gives exit codes."""
    data = given.encode() if isinstance(given, str) else given
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["prefixcache", *arguments]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(data))),
        mock.patch.dict(os.environ, {"COLUMNS": "200"} | extra),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Told(code, out.getvalue(), err.getvalue())
