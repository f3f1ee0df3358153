"""Figures in documents: a command puts what it measured between two marks, and nothing by hand.

```
<!-- figures: soak -->
    …
<!-- end: soak -->
```
"""

from __future__ import annotations

import re
from pathlib import Path

from prefixcache_bench.reports.provenance import provenance


def publish(document: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of `name` by a block with `text` and its origin.

    Raises:
        SystemExit: the document has no such marks.
    """
    origin = provenance()
    block = (
        f"<!-- figures: {name} -->\n```\n{text.rstrip()}\n```\n"
        f"{origin['time'][:10]} · commit {origin['commit']} · {origin['machine']}\n"
        f"<!-- end: {name} -->"
    )
    marks = re.compile(
        rf"<!-- figures: {re.escape(name)} -->.*?<!-- end: {re.escape(name)} -->", re.DOTALL
    )
    whole, count = marks.subn(lambda _: block, document.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{document} has no marks for the figures of {name!r}")
    document.write_text(whole, encoding="utf-8")
