"""What a result says of where it comes from, and what it does not."""

from __future__ import annotations

import sys

import pytest

from prefixcache_bench.reports.provenance import provenance


def test_the_command_does_not_tell_the_folders_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["/home/me/traces", "--out=/home/me/rows.csv", "--jobs", "1", "--only=a=b", "docs/x.md"]
    monkeypatch.setattr(sys, "argv", ["program", *given])
    command = provenance()["command"]
    assert command.endswith("traces --out=rows.csv --jobs 1 --only=a=b docs/x.md")
    assert "/home" not in command
