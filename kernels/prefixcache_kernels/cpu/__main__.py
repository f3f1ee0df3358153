"""Say how attention is done on this machine's CPU: `python -m prefixcache_kernels.cpu`.

Exit code 1 if there is no library.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from prefixcache.plain_json import json_text
from prefixcache_kernels.cpu.library import describe, library


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the library if need be, and describe it, or say why there is none."""
    parser = argparse.ArgumentParser(prog="prefixcache_kernels.cpu", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args(arguments)
    made = library()
    facts: dict[str, object] = {"attention": describe(), "library": None}
    if made is not None:
        facts |= {"library": str(made.path), "width": made.width, "threaded": made.threaded}
    print(json_text(facts) if asked.json else facts["attention"])  # noqa: T201
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
