"""Tables of numbers: the first column to the left, the others to the right."""

from __future__ import annotations

from collections.abc import Sequence

from prefixcache.cli import view


def print_numbers(rows: Sequence[Sequence[str]], *, indent: str = "") -> None:
    """Print rows in columns; the first row is the head."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    view.print_table(
        [
            (row[0], *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)))
            for row in rows
        ],
        indent=indent,
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Give rows as a Markdown table; the first row is the head."""
    head, *body = rows
    lines = [" | ".join(head), " | ".join(["---", *["---:"] * (len(head) - 1)])]
    lines += [" | ".join(row) for row in body]
    return "\n".join(f"| {line} |" for line in lines)
