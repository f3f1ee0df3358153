"""Mutants of a module: one small fault each, made in its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import CodeType
from typing import NamedTuple

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


class Mutant(NamedTuple):
    """One fault in one module."""

    line: int
    function: int
    """First line of the function that it is in, decorators included; 0: of none."""
    what: str
    """The line's code before and after."""
    code: CodeType


class _Change(NamedTuple):
    """What to put into one field of one node."""

    node: ast.AST
    field: str
    value: object
    line: int
    function: int
    removed: ast.AST | None = None
    """The statement that goes."""


def count(source: str) -> int:
    """Count the mutants of a module, without making them."""
    return sum(1 for _ in _changes(ast.parse(source), 0))


def mutants(source: str, path: str, only: int | None = None) -> Iterator[Mutant]:
    """Give every mutant of a module, in the order of its syntax tree, one at a time; or one.

    Left alone: annotations, docstrings, messages, `__slots__`, what is imported for types alone,
    and what asserts, which is a test itself.
    """
    tree = ast.parse(source)
    for number, change in enumerate(list(_changes(tree, 0))):
        if only is not None and number != only:
            continue
        old = getattr(change.node, change.field)
        before = _text(change.removed or change.node)
        setattr(change.node, change.field, change.value)
        ast.fix_missing_locations(tree)
        after = "removed" if change.removed else _text(change.node)
        what = f"{before}  ->  {after}"
        yield Mutant(change.line, change.function, what, compile(tree, path, "exec"))
        setattr(change.node, change.field, old)


def _text(node: ast.AST) -> str:
    lines = ast.unparse(node).splitlines()
    return (lines[0] if lines else "")[:90]


def _changes(node: ast.AST, function: int) -> Iterator[_Change]:
    if _is_left_alone(node):
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    if hasattr(node, "lineno"):
        for field, value in _faults(node):
            yield _Change(node, field, value, node.lineno, function)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        many = value if isinstance(value, list) else [value]
        for at, child in enumerate(many):
            if isinstance(value, list) and field in ("body", "orelse") and _can_go(child):
                rest: list[ast.stmt] = [*many[:at], ast.Pass(), *many[at + 1 :]]
                yield _Change(node, field, rest, child.lineno, function, child)
            if isinstance(child, ast.AST):
                yield from _changes(child, function)


def _is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert | ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
        return True
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(one, ast.Assert)
        or (isinstance(one, ast.Name) and one.id == "AssertionError" and "check" in node.name)
        for one in ast.walk(node)
    )


def _can_go(statement: ast.stmt) -> bool:
    """Whether nothing that follows needs the name that a statement makes."""
    if isinstance(statement, ast.Assign):
        return all(isinstance(one, ast.Attribute | ast.Subscript) for one in statement.targets)
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)
    return isinstance(statement, ast.AugAssign | ast.Delete | ast.Break | ast.Continue)


def _faults(node: ast.AST) -> Iterator[tuple[str, object]]:
    """Give (field, other value) for each fault that a node can have."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
        yield "ops", [_SWAPS[type(node.ops[0])](), *node.ops[1:]]
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPS:
        yield "op", _SWAPS[type(node.op)]()
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "value", not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "value", node.value + 1
    elif isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(
        node.test, ast.Compare | ast.Constant
    ):
        yield "test", ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != "None":
        yield "value", ast.Constant(None)
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
            yield "func", ast.Name({"min": "max", "max": "min"}[node.func.id], ast.Load())
        elif len(node.args) >= 2 and not any(isinstance(one, ast.Starred) for one in node.args):
            yield "args", [node.args[1], node.args[0], *node.args[2:]]
