"""What reusing tokens at other places costs in quality: the demo model's certificate, drawn.

    python -m prefixcache_bench.speed.segments [--quick] [--certificate FILE] [--publish]

`prefixcache verify-segments` says what is measured, and how.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from prefixcache_bench.reports.figures import publish
from prefixcache_bench.reports.pictures import draw_segments
from prefixcache_bench.speed.signals import ending_in_order
from prefixcache_worker.segments import certificate, texts

DOCUMENT: Final = Path("docs/segments.md")
PICTURE: Final = Path("docs/segments/quality.svg")
TITLE: Final = "Tokens at other places: quality against what is computed again"


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Make the certificate, or read the one that is named."""
    if options.certificate:
        found: dict[str, Any] = json.loads(options.certificate.read_text(encoding="utf-8"))
        if found.get("format") != certificate.FORMAT:
            raise SystemExit(f"{options.certificate} is no certificate: {certificate.FORMAT!r}")
        return found
    chosen = texts.load()
    if options.quick:
        chosen = texts.Texts(chosen.digest, chosen.all[:1])
    model, angles = certificate.load(options.model, options.threads)
    num_answer = 4 if options.quick else 24
    return certificate.certify(model, angles, chosen, num_answer=num_answer)


def main(argv: list[str] | None = None) -> int:
    """Measure or read, print, and publish if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.segments", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="one text, few tokens")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE", help="that verify-segments has written"
    )
    parser.add_argument(
        "--publish", action="store_true", help=f"put the tables into {DOCUMENT}, and draw {PICTURE}"
    )
    options = parser.parse_args(argv)
    made = measured(options)
    text = "\n".join(certificate.lines_of(made))
    print(text)
    if options.publish:
        publish(DOCUMENT, "certificate", f"$ prefixcache verify-segments {options.model}\n{text}")
        draw_segments(PICTURE, TITLE, made)
    return 0


if __name__ == "__main__":
    with ending_in_order():
        sys.exit(main())
