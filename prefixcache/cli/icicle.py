"""An outline as an icicle, in SVG: every run a bar as wide as the tokens of its branch.

```
┌──────────────── tiny-model ────────────────┐   width    tokens of the branch, ghosts included
├────────── "You are a helpful …" ─────┬─────┤   colour   heat: dark was used last
├── "Plan a trip" ──┬─╱╱╱╱╱─┬┄┄┄┄┄┄┄┄┬─┘ …   │   hatched  leased now
└───────────────────┴───────┴┄┄┄┄┄┄┄┄┘       │   outline  a ghost: evicted, remembered
```
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax import saxutils

from prefixcache.cli import decoder as decoding
from prefixcache.cli import view
from prefixcache.outline import Branch, Extent, NamespaceOutline
from prefixcache.texts import escape, many

_WIDTH = 1200.0
_MARGIN = 16.0
_ROW = 24.0
_CHAR = 6.7
"""Width of a character at the size of the labels."""
_LEAST = 0.4
"""Bars thinner than this are not drawn."""

_COLD, _WARM = (222, 235, 247), (8, 69, 148)
"""Ends of the scale, blue: told apart also without colour vision, and in print."""

_STYLE = """
text{font:12px system-ui,'DejaVu Sans',sans-serif;fill:#111}
.bar{stroke:#fff;stroke-width:1}
.ghost{fill:#fafafa;stroke:#888;stroke-width:1;stroke-dasharray:4 3}
.more{fill:#e6e6e6;stroke:#fff;stroke-width:1}
.on-dark{fill:#fff}
.quiet{fill:#555}
""".strip()

Part = tuple[NamespaceOutline, "decoding.Decoder | None"]


def draw(parts: Sequence[Part]) -> str:
    """Draw namespaces below one another; a whole SVG file.  O(branches)."""
    body: list[str] = []
    y = _MARGIN
    for part, reader in parts:
        y = _draw_namespace(part, reader, y, body) + _ROW
    y = _draw_legend(y, body)
    width, height = _WIDTH + 2 * _MARGIN, y + _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img">\n'
        "<title>Prefixes stored in the cache: width is tokens, dark was used last</title>\n"
        f"<style>{_STYLE}</style>\n"
        '<defs><pattern id="leased" width="8" height="8" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="3" height="8" fill="#fff" '
        'fill-opacity=".45"/></pattern></defs>\n'
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _draw_namespace(
    part: NamespaceOutline, reader: decoding.Decoder | None, y: float, body: list[str]
) -> float:
    """Draw one tree from `y` down; give where it ends."""
    root = part.branches[0]
    scale = _WIDTH / max(1, _size(root.below))
    name = view.show_namespace(part.namespace)
    deepest = 0
    free = [_MARGIN]
    """Where the next branch of each depth begins."""
    for branch in part.branches:
        x = free[branch.depth]
        width = _size(branch.below) * scale
        free[branch.depth :] = [x + width, x]
        own_y = y + branch.depth * _ROW
        if width >= _LEAST:
            deepest = max(deepest, branch.depth)
            label = name if not branch.depth else decoding.preview(reader, branch.tokens, 80)
            _draw_bar(branch, label, x, own_y, width, root, body)
            if branch.num_more:
                left = _size(branch.more) * scale
                if left >= _LEAST:
                    deepest = max(deepest, branch.depth + 1)
                    _draw_more(branch, x + width - left, own_y + _ROW, left, body)
    return y + (deepest + 1) * _ROW


def _xml(text: str) -> str:
    """Write a text such that a reader of XML takes it: which no control character is."""
    return saxutils.escape(escape(text))


def _size(extent: Extent) -> int:
    return extent.tokens + extent.ghost_tokens


def _draw_bar(
    branch: Branch, label: str, x: float, y: float, width: float, root: Branch, body: list[str]
) -> None:
    box = f'x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{_ROW - 1:g}"'
    body.append(f"<g><title>{_xml(_tooltip(branch, label, root))}</title>")
    dark = False
    if branch.is_ghost:
        body.append(f'<rect class="ghost" {box}/>')
    else:
        fill, dark = ("#d9d9d9", False) if not branch.depth else _colour(branch.heat)
        body.append(f'<rect class="bar" {box} fill="{fill}"/>')
        if branch.num_locks and branch.depth:
            body.append(f'<rect {box} fill="url(#leased)"/>')
    if branch.is_pinned:
        label = f"◆ {label}"
    fits = int((width - 8) / _CHAR)
    if fits >= 3:
        text = label if len(label) <= fits else label[: fits - 1] + "…"
        shade = ' class="on-dark"' if dark else ""
        body.append(f'<text{shade} x="{x + 4:.1f}" y="{y + 16:.1f}">{_xml(text)}</text>')
    body.append("</g>")


def _draw_more(branch: Branch, x: float, y: float, width: float, body: list[str]) -> None:
    text = f"… {branch.num_more:,} more"
    body.append(
        f"<g><title>{text}: {many(branch.more.tokens, 'token')} in "
        f"{many(branch.more.blocks, 'block')}, "
        f"{branch.more.ghost_tokens:,} evicted</title>"
        f'<rect class="more" x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{_ROW - 1:g}"/>'
    )
    if len(text) * _CHAR + 8 <= width:
        body.append(f'<text class="quiet" x="{x + 4:.1f}" y="{y + 16:.1f}">{text}</text>')
    body.append("</g>")


def _colour(heat: float) -> tuple[str, bool]:
    """Give the colour of a heat, and whether text on it must be light."""
    mixed = [round(a + (b - a) * heat) for a, b in zip(_COLD, _WARM, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed), heat > 0.45


def _tooltip(branch: Branch, label: str, root: Branch) -> str:
    below = branch.below
    if branch.is_ghost:
        return f"{label}\n{many(below.ghost_tokens, 'token')}: evicted, still remembered"
    share = below.tokens / max(1, root.below.tokens)
    lines = [
        label,
        f"tokens {branch.start:,} to {branch.start + branch.num_tokens:,}",
        f"{many(below.tokens, 'token')} ({share:.1%}) in {many(below.blocks, 'block')}, "
        f"{many(below.runs, 'run')}",
    ]
    if branch.num_locks:
        lines.append(f"leased ({branch.num_locks} locks)")
    elif branch.depth:
        lines.append(f"last used {view.show_idle(branch.idle_s)} ago")
    if branch.num_uses is not None:
        lines.append(f"{branch.num_uses:,} uses")
    if branch.is_pinned:
        lines.append("pinned")
    if branch.num_parted:
        lines.append(f"{many(branch.num_parted, 'request', 'part')} at token {branch.parted_at:,}")
    return "\n".join(lines)


def _draw_legend(y: float, body: list[str]) -> float:
    x = _MARGIN
    box = f'y="{y:.1f}" width="28" height="14"'
    steps = [
        (f'<rect class="bar" x="{{x:.1f}}" {box} fill="{_colour(1.0)[0]}"/>', "used last"),
        (f'<rect class="bar" x="{{x:.1f}}" {box} fill="{_colour(0.5)[0]}"/>', "earlier"),
        (f'<rect class="bar" x="{{x:.1f}}" {box} fill="{_colour(0.0)[0]}"/>', "long ago"),
        (
            f'<rect class="bar" x="{{x:.1f}}" {box} fill="{_colour(1.0)[0]}"/>'
            f'<rect x="{{x:.1f}}" {box} fill="url(#leased)"/>',
            "leased now",
        ),
        (f'<rect class="ghost" x="{{x:.1f}}" {box}/>', "ghost: evicted, remembered"),
        (f'<rect class="more" x="{{x:.1f}}" {box}/>', "more, summed up"),
    ]
    for shape, text in steps:
        body.append(shape.format(x=x))
        body.append(f'<text class="quiet" x="{x + 34:.1f}" y="{y + 11:.1f}">{text}</text>')
        x += 34 + len(text) * _CHAR + 24
    return y + _ROW
