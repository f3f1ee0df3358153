"""`prefixcache tree`: what is stored, as a tree of runs; as text, JSON, or a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixcache.cli import decoder as decoding
from prefixcache.cli import view
from prefixcache.errors import InvalidRequest
from prefixcache.outline import Branch, NamespaceOutline, Order, Outline
from prefixcache.texts import many
from prefixcache.types import unpack

_HEAT = "▁▂▃▄▅▆▇█"
_LEGEND = "● leased   ◆ pinned   ░ ghost: evicted, still remembered   ⑂ where requests part"


def tree(
    depth: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Runs below the root to show; any.", show_default=False
        ),
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Only the tree of this model; with --adapter, --tenant, --salt.",
            show_default=False,
        ),
    ] = None,
    adapter: view.Adapter = "",
    tenant: view.Tenant = "",
    salt: view.Salt = "",
    sort: Annotated[
        Order, typer.Option(help="Largest first, or what was used last first.")
    ] = Order.TOKENS,
    limit: Annotated[
        int, typer.Option(min=1, metavar="N", help="Runs to show in all; the rest is summed up.")
    ] = 40,
    no_ghosts: Annotated[
        bool, typer.Option("--no-ghosts", help="Without what was evicted.", show_default=False)
    ] = False,
    svg: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw an icicle: width = tokens, colour = heat, hatched = leased, "
            "outlined = ghosts. Up to 2,000 runs, if --limit is not given.",
            show_default=False,
        ),
    ] = None,
    tokenizer: decoding.TokenizerPath = None,
    connect: view.Connect = None,
    as_json: view.AsJson = False,
) -> None:
    """Show what is stored: which runs of tokens, how many, how warm, who holds them.

    Changes nothing.  Exit code 1: nothing is stored.

    Example: prefixcache tree --depth 2 --sort heat
    """
    if svg is not None:
        view.refuse_beside("--svg", {"--json": as_json})
        limit = 2000 if limit == 40 else limit
    view.Chosen(namespace, adapter, tenant, salt).named_or_all("--namespace")
    with view.open_client(connect) as client:
        chosen = None
        if namespace is not None:
            chosen = view.choose_namespace(client, namespace, adapter, tenant, salt)
        outline = client.outline(
            chosen, order=sort, max_branches=limit, max_depth=depth, ghosts=not no_ghosts
        )
    if as_json:
        view.print_json(fields(outline))
    elif svg is not None:
        _draw(svg, outline, tokenizer)
    else:
        _print(outline, tokenizer)
    if not any(part.branches[0].below.runs for part in outline.namespaces):
        raise typer.Exit(1)


def fields(outline: Outline) -> dict[str, Any]:
    """Give an outline as plain values."""
    return {
        "block_size": outline.block_size,
        "num_moved": outline.num_moved,
        "num_more": outline.num_more,
        "more": asdict(outline.more),
        "namespaces": [
            view.namespace_fields(part.namespace)
            | {
                "branches": [
                    asdict(branch) | {"tokens": unpack(branch.tokens).tolist()}
                    for branch in part.branches
                ]
            }
            for part in outline.namespaces
        ],
    }


def _draw(path: Path, outline: Outline, tokenizer: Path | None) -> None:
    from prefixcache.cli import icicle

    parts = [
        (part, decoding.open_decoder(tokenizer, part.namespace)) for part in outline.namespaces
    ]
    try:
        path.write_text(icicle.draw(parts), encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}") from None
    runs = sum(part.branches[0].below.runs for part in outline.namespaces)
    view.tell(f"{path}: {many(runs, 'run')} of {many(len(parts), 'namespace')}")


def _print(outline: Outline, tokenizer: Path | None) -> None:
    width = view.width()
    if not outline.namespaces:
        view.tell("nothing is stored")
        return
    for part in outline.namespaces:
        reader = decoding.open_decoder(tokenizer, part.namespace)
        for line in lines(part, reader, width):
            view.tell(line)
    view.tell(_LEGEND if width >= len(_LEGEND) else "● leased ◆ pinned ░ ghost ⑂ parting")
    if outline.num_more:
        view.tell(
            f"({many(outline.num_more, 'namespace')} more with "
            f"{many(outline.more.tokens, 'token')}: name one with --model)"
        )
    if outline.num_moved:
        view.tell(f"({many(outline.num_moved, 'run')} changed during the walk and are not counted)")


def lines(part: NamespaceOutline, reader: decoding.Decoder | None, width: int) -> Iterator[str]:
    """Write one namespace's tree: numbers in columns, then the branch and how its text begins."""
    root = part.branches[0]
    below = root.below
    yield view.cut(
        f"{view.show_namespace(part.namespace)}: {many(below.tokens, 'token')} in "
        f"{many(below.blocks, 'block')}, {many(below.runs, 'run')}"
        + (f"; {below.ghost_tokens:,} evicted tokens remembered" if below.ghost_tokens else ""),
        width,
    )
    wide = width >= 60
    yield view.cut(_columns("tokens", "share", "blocks", "heat", "idle", wide=wide) + "run", width)
    children = _children(part.branches)
    stack = _items(part.branches, children, 0, "")
    while stack:
        index, rest, indent, last = stack.pop()
        branch = part.branches[index]
        joint = "" if not branch.depth and not rest else "└─ " if last else "├─ "
        head = f"{indent}{joint}"
        if rest:
            yield view.cut(_rest(branch, below.tokens, head, wide=wide), width)
            continue
        row = _row(branch, below.tokens, wide=wide) + head + _marks(branch)
        yield view.cut(row + _says(branch, reader, width - len(row)), width)
        stack += _items(part.branches, children, index, indent + ("   " if last else "│  "))


_Item = tuple[int, bool, str, bool]
"""A branch, whether what is left out below it is meant, its indent, whether it is the last."""


def _children(branches: Sequence[Branch]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    path: list[int] = []
    for index, branch in enumerate(branches):
        del path[branch.depth :]
        if path:
            found.setdefault(path[-1], []).append(index)
        path.append(index)
    return found


def _items(
    branches: Sequence[Branch], children: dict[int, list[int]], above: int, indent: str
) -> list[_Item]:
    """Give what is drawn below a branch, the first one at the end."""
    below = [(index, False, indent, False) for index in children.get(above, ())]
    if branches[above].num_more:
        below.append((above, True, indent, False))
    if below:
        index, rest, _, _ = below[-1]
        below[-1] = (index, rest, indent, True)
    return below[::-1]


def _columns(tokens: str, share: str, blocks: str, heat: str, idle: str, *, wide: bool) -> str:
    if not wide:
        return f"{tokens:>8} {heat:1.1} "
    return f"{tokens:>10} {share:>6} {blocks:>8} {heat:>4} {idle:>6}  "


def _row(branch: Branch, total: int, *, wide: bool) -> str:
    below = branch.below
    if branch.is_ghost:
        return _columns(f"{below.ghost_tokens:,}", "", "", "", "", wide=wide)
    return _columns(
        f"{below.tokens:,}",
        f"{below.tokens / max(1, total):.1%}",
        f"{below.blocks:,}",
        glyph(branch),
        "now" if branch.num_locks else view.show_idle(branch.idle_s),
        wide=wide,
    )


def glyph(branch: Branch) -> str:
    """Draw a branch's heat, in one character."""
    return _HEAT[min(len(_HEAT) - 1, int(branch.heat * len(_HEAT)))]


def _rest(branch: Branch, total: int, head: str, *, wide: bool) -> str:
    more = branch.more
    if not more.tokens:
        row = _columns(f"{more.ghost_tokens:,}", "", "", "", "", wide=wide)
        return f"{row}{head}░ … {branch.num_more:,} more"
    share = f"{more.tokens / max(1, total):.1%}"
    row = _columns(f"{more.tokens:,}", share, f"{more.blocks:,}", "", "", wide=wide)
    return f"{row}{head}… {branch.num_more:,} more"


def _marks(branch: Branch) -> str:
    marks = "░ " * branch.is_ghost + "● " * (branch.num_locks > 0) + "◆ " * branch.is_pinned
    if branch.num_parted:
        marks += f"⑂{branch.num_parted:,}@{branch.parted_at:,} "
    return marks


def _says(branch: Branch, reader: decoding.Decoder | None, room: int) -> str:
    count = "" if branch.num_tokens == branch.below.tokens else f" ({branch.num_tokens:,})"
    text = decoding.preview(reader, branch.tokens, max(1, room - len(count)))
    return text + count
