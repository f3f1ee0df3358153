"""No test ends because the machine is slow: what is waited for is waited for with patience."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from patience import PATIENCE_S

HERE = Path(__file__).resolve().parent
WAITS = {"wait", "join", "result", "communicate", "timeout"}
"""Methods whose first argument is a limit, in seconds."""
RUNS = ("chaos", "fuzz")
"""Run by themselves for as long as they are told: what takes too long is what they look for."""
SHORT_S = 3.0
"""Below it a time is no limit for what must happen, but how long it is looked at, or does not."""
FILES = [path for path in sorted(HERE.rglob("*.py")) if path.relative_to(HERE).parts[0] not in RUNS]


def number(node: ast.expr | None) -> float | None:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)
    return None


def limits(text: str) -> Iterator[tuple[int, float]]:
    """Give every bare limit of a wait: its line, and its seconds."""
    for node in ast.walk(ast.parse(text)):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.Call):
            found += [key.value for key in node.keywords if key.arg == "timeout"]
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if name in WAITS and len(node.args) == 1:
                found.append(node.args[0])
            if name == "wait_for" and len(node.args) == 2:
                found.append(node.args[1])
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left = node.left
            clocked = isinstance(left, ast.Call) and isinstance(left.func, ast.Attribute)
            if clocked and left.func.attr == "monotonic":  # type: ignore[attr-defined]
                found.append(node.right)
        for one in found:
            seconds = number(one)
            if seconds is not None and SHORT_S <= seconds < PATIENCE_S:
                yield one.lineno, seconds  # type: ignore[union-attr]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(HERE).as_posix())
def test_what_must_happen_is_waited_for_with_patience(path: Path) -> None:
    found = [f"line {line}: {seconds:g} s" for line, seconds in limits(path.read_text())]
    assert not found, f"{path.name} would fail on a slow machine; use PATIENCE_S: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "process.wait(5)",
        "reply.result(timeout=5.0)",
        "subprocess.run(x, timeout=60)",
        "asyncio.wait_for(story(), 20.0)",
        "deadline = time.monotonic() + 10",
        "asyncio.timeout(5)",
    ],
)
def test_a_bare_limit_is_seen(line: str) -> None:
    assert len(list(limits(line))) == 1
    assert not list(limits(re.sub(r"[\d.]+(?=\)|$)", "PATIENCE_S", line)))
