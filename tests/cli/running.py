"""Commands as users run them: in another process, with what they print and their exit code."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from wire.service_process import command, environment


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
