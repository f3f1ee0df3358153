"""Jinja, kept within bounds: no attribute of Python's, so many steps, texts of such a length.

The parsed template is changed before it is compiled: what a loop runs over is counted first, what
`~` and a filter give is measured.  Calls and operators pass through the sandbox anyway.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from functools import wraps
from typing import Any, Final

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prefixcache.errors import InvalidRequest
from prefixcache.plain_json import json_text

_LARGEST: Final = 1_000_000
"""A number that a function takes, such as a width; a power or a repetition has it as well."""
_CALL: Final = 10
"""Steps that a call costs."""


class Sandbox:
    """One template.

    Args:
        source: In Jinja's language.
        longest: Characters that any text may have.
        steps: Turns of loops, and calls, per rendering.

    Raises:
        InvalidRequest: it is no template.
    """

    def __init__(self, source: str, longest: int, steps: int) -> None:
        self._bounds = _Bounded(longest, steps)
        try:
            parsed = self._bounds.parse(source)
            self.names = find_undeclared_variables(parsed)
            """What it asks for from outside."""
            self.words = frozenset(re.findall(r"\w+", source))
            code = self._bounds.compile(_counted(parsed))
            made = self._bounds.template_class.from_code
            self._template = made(self._bounds, code, self._bounds.make_globals(None))
        except Exception as error:  # noqa: BLE001 - whatever a stranger's template breaks
            raise InvalidRequest(f"the chat template is none: {_reason(error)}") from None

    def render(self, context: dict[str, Any]) -> str:
        """Run it.

        Raises:
            InvalidRequest: it refuses, fails, or goes beyond its bounds.
        """
        self._bounds.begin()
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(context):
                size += len(part)
                self._bounds.measure(size)
                parts.append(part)
        except Exception as error:  # noqa: BLE001 - a template is a program, and somebody else's
            raise InvalidRequest(f"the chat template says: {_reason(error)}") from None
        return "".join(parts)


class _Bounded(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, longest: int, steps: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed before it is bounded
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self._longest, self._steps, self._left = longest, steps, steps
        self.filters["tojson"] = _to_json
        self.filters = {name: self._guarded(name, one) for name, one in self.filters.items()}
        self.filters |= {"_counted": self._count, "_measured": self._pass}
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now}

    def begin(self) -> None:
        self._left = self._steps

    def measure(self, size: int) -> None:
        if size > self._longest:
            raise SecurityError(f"it writes more than {self._longest:,} characters")

    def call(self, context: Any, called: Any, /, *args: Any, **options: Any) -> Any:
        self._spend(_CALL)
        for one in (*args, *options.values()):
            self._check_number(one)
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str):
            self._check_method(owner, called.__name__, args)
        return self._pass(super().call(context, called, *args, **options))

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        owner = getattr(value, "__self__", None)
        if wrapped is not None and isinstance(owner, str):
            self._check_method(owner, "format", ())
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._spend(1)
        if operator in {"*", "**"}:
            sized = left if hasattr(left, "__len__") else right
            if hasattr(sized, "__len__"):
                times = right if sized is left else left
                if isinstance(times, int):
                    self.measure(len(sized) * max(times, 0))
            self._check_number(right if operator == "**" else 0, most=64)
            self._check_number(left if isinstance(left, int) else 0, most=2**63)
            self._check_number(right if isinstance(right, int) else 0, most=2**63)
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self.measure(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            self._check_widths(left)
        return self._pass(super().call_binop(context, operator, left, right))

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise SecurityError(f"it takes more than {self._steps:,} steps")

    def _count(self, given: Any) -> Any:
        """Count what a loop runs over, before it does."""
        if not hasattr(given, "__len__"):
            kept = []
            for one in given:
                self._spend(1)
                kept.append(one)
            return kept
        self._spend(len(given))
        return given

    def _pass(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple | dict | bytes):
            self.measure(len(value))
        return value

    def _guarded(self, name: str, function: Any) -> Any:
        """Look at what a filter is given, as at the method of the same name."""

        @wraps(function)
        def guarded(*args: Any, **options: Any) -> Any:
            given = args[1:] if hasattr(function, "jinja_pass_arg") else args
            for one in (*given[1:], *options.values()):
                self._check_number(one)
            if name == "join":
                between = str(given[1]) if len(given) > 1 else str(options.get("d", ""))
                self._check_method(between, "join", (list(self._count(given[0])),))
            elif given and isinstance(given[0], str):
                self._check_method(given[0], name, given[1:])
            return function(*args, **options)

        return guarded

    def _check_number(self, value: Any, most: int = _LARGEST) -> None:
        if isinstance(value, int | float) and not -most <= value <= most:
            raise SecurityError(f"it asks for {value:.3g}, at most {most:,}")

    def _check_widths(self, form: str) -> None:
        for width in re.findall(r"\d{5,}|\*", form):
            raise SecurityError(f"it formats with the width {width[:20]}")

    def _check_method(self, owner: str, name: str, args: tuple[Any, ...]) -> None:
        if name == "replace" and len(args) >= 2 and isinstance(args[0], str):
            self.measure(len(owner) + owner.count(args[0]) * len(str(args[1])))
        elif name == "join" and args:
            sizes = [len(one) if isinstance(one, str) else 16 for one in self._count(args[0])]
            self.measure(sum(sizes) + len(owner) * len(sizes))
        elif name == "indent":
            width = args[0] if args and isinstance(args[0], int) else 4
            self.measure(len(owner) + (owner.count("\n") + 1) * max(width, 0))
        elif name in {"format", "format_map"}:
            self._check_widths(owner)
            if re.search(r"\{[^}]*\{", owner):
                raise SecurityError("it formats with a width of its own")


class _Generation(Extension):
    """`{% generation %}` marks what an assistant says; here it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _counted(parsed: nodes.Template) -> nodes.Template:
    """Put a count around what loops run over, and a measure around `~` and filters."""
    _wrap(parsed)
    return parsed


def _wrap(node: nodes.Node) -> None:
    for name, child in list(node.iter_fields()):
        if isinstance(child, nodes.Node):
            _wrap(child)
            setattr(node, name, _wrapped(child))
        elif isinstance(child, list):
            for one in child:
                if isinstance(one, nodes.Node):
                    _wrap(one)
            setattr(
                node,
                name,
                [_wrapped(one) if isinstance(one, nodes.Node) else one for one in child],
            )
    if isinstance(node, nodes.For):
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)


def _wrapped(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Concat) or (isinstance(node, nodes.Filter) and node.node is not None):
        return nodes.Filter(node, "_measured", [], [], None, None, lineno=node.lineno)
    return node


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return (str(error) or type(error).__name__)[:300]


def _refuse(message: str) -> None:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Iterable[str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json_text(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=None if separators is None else tuple(separators),
        sort_keys=sort_keys,
    )
