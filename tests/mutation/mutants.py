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

_PACE = frozenset(
    {
        *("_rebuild_at", "_tidy_at", "_many_roots", "_FEW_ROOTS", "_PAUSE_EVERY", "_AHEAD"),
        *("_SPARE", "_SPARE_DEADLINES", "_SPARE_NUMBERS", "_STALE", "_serial", "walks"),
    }
)
"""Names of what says when to tidy up or to pause, and of numbers that are only told apart: one more
or less is nobody's promise.  That it is done, and that it is bounded, is."""


class Mutant(NamedTuple):
    """One fault in one module."""

    line: int
    function: str
    """The function that it is in, as `Class.method`; of one inside another, the outer; "": none."""
    what: str
    """The line's code before and after."""
    code: CodeType

    @property
    def name(self) -> str:
        """What is the same in each version of the module: it is known by this."""
        return f"{self.function}: {self.what}"


class _Change(NamedTuple):
    """What to put into one field of one node."""

    node: ast.AST
    field: str
    value: object
    line: int
    place: _Place
    removed: ast.AST | None = None
    """The statement that goes."""


class _Place(NamedTuple):
    """What a node is in."""

    function: str = ""
    within: str = ""
    """The classes, and the function."""
    statement: ast.AST | None = None


def count(source: str) -> int:
    """Count the mutants of a module, without making them."""
    return sum(1 for _ in _changes(ast.parse(source), _Place()))


def mutants(source: str, path: str, only: int | None = None) -> Iterator[Mutant]:
    """Give every mutant of a module, in the order of its syntax tree, one at a time; or one.

    Left alone is what no behaviour follows from: annotations, docstrings, messages, decorators,
    `__slots__`, `__all__`, `__repr__`, names deleted early, what is imported for types alone, by
    one more or less when to tidy up; and what asserts (`strict=True` does), which is a test itself.
    """
    tree = ast.parse(source)
    for number, change in enumerate(list(_changes(tree, _Place()))):
        if only is not None and number != only:
            continue
        old = getattr(change.node, change.field)
        shown = change.node
        if isinstance(shown, ast.Constant) and change.place.statement:
            shown = change.place.statement  # a number alone says nothing
        before = _text(change.removed or shown)
        setattr(change.node, change.field, change.value)
        ast.fix_missing_locations(tree)
        after = "removed" if change.removed else _text(shown)
        what = f"{before}  ->  {after}"
        yield Mutant(change.line, change.place.function, what, compile(tree, path, "exec"))
        setattr(change.node, change.field, old)


def _text(node: ast.AST) -> str:
    lines = ast.unparse(node).splitlines()
    return (lines[0] if lines else "")[:200]


def _changes(node: ast.AST, place: _Place) -> Iterator[_Change]:
    if _is_left_alone(node):
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        within = f"{place.within}.{node.name}".lstrip(".")
        is_class = isinstance(node, ast.ClassDef)
        place = _Place(place.function or ("" if is_class else within), within)
    if isinstance(node, ast.stmt):
        place = place._replace(statement=node)
    if hasattr(node, "lineno"):
        for field, value in _faults(node):
            if _is_one_more(node) and place.statement and _is_pace(place.statement):
                continue
            yield _Change(node, field, value, node.lineno, place)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        many = value if isinstance(value, list) else [value]
        for at, child in enumerate(many):
            if isinstance(value, list) and field in ("body", "orelse") and _can_go(child):
                rest: list[ast.stmt] = [*many[:at], ast.Pass(), *many[at + 1 :]]
                yield _Change(node, field, rest, child.lineno, place, child)
            if isinstance(child, ast.AST):
                yield from _changes(child, place)


def _is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert | ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__slots__", "__all__"):
        return True
    if isinstance(node, ast.keyword) and node.arg in ("strict", "repr", "slots"):
        return True
    return isinstance(node, ast.FunctionDef) and (
        node.name in ("__repr__", "__str__")
        or any(
            isinstance(one, ast.Assert)
            or (isinstance(one, ast.Name) and one.id == "AssertionError" and "check" in node.name)
            for one in ast.walk(node)
        )
    )


def _is_one_more(node: ast.AST) -> bool:
    """Whether the faults of a node are that a number, or a bound, is by one another."""
    if isinstance(node, ast.Compare):
        return isinstance(node.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE)
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _is_pace(statement: ast.stmt) -> bool:
    """Whether a statement, or the test of one that has others below it, says when to tidy up."""
    told = statement.test if isinstance(statement, ast.If | ast.While) else statement
    names = (getattr(one, "id", getattr(one, "attr", "")) for one in ast.walk(told))
    return not hasattr(told, "body") and not _PACE.isdisjoint(names)


def _can_go(statement: ast.stmt) -> bool:
    """Whether nothing that follows needs the name that a statement makes."""
    if isinstance(statement, ast.Assign):
        return all(isinstance(one, ast.Attribute | ast.Subscript) for one in statement.targets)
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)
    if isinstance(statement, ast.Delete):
        return not all(isinstance(one, ast.Name) for one in statement.targets)
    return isinstance(statement, ast.AugAssign | ast.Break | ast.Continue)


def _is_no(value: ast.expr) -> bool:
    """Whether None in its place would say the same."""
    return isinstance(value, ast.Constant) and (value.value is None or value.value is False)


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
    elif isinstance(node, ast.Return) and node.value and not _is_no(node.value):
        yield "value", ast.Constant(None)
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
            yield "func", ast.Name({"min": "max", "max": "min"}[node.func.id], ast.Load())
        elif len(node.args) >= 2 and not any(isinstance(one, ast.Starred) for one in node.args):
            yield "args", [node.args[1], node.args[0], *node.args[2:]]
