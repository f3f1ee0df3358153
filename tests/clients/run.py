"""`make clients`: try all clients against `prefixcache up`; the table goes to docs/clients.md.

    PYTHONPATH=tests python -m clients.run --light FOLDER [--heavy FOLDER] [--only NAME] [--publish]

Exit code 0 only if everything that was tried worked.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from pathlib import Path

from clients.zoo import HEAVY, LIGHT, Tried, lacks, try_client
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.speed.endpoint import endpoint
from prefixcache_worker import smollm2

DOCUMENT = Path(__file__).parents[2] / "docs" / "clients.md"
_WIDTH = 100


def table(found: list[Tried]) -> str:
    """Write what each client did."""
    lines: list[str] = []
    for one in found:
        lines.append(one.client or one.name)
        told = ", ".join(one.done) or "nothing"
        lines += textwrap.wrap(told, _WIDTH, initial_indent="    ", subsequent_indent="    ")
        if one.refused:
            lines.append(f"    refused by name: {', '.join(one.refused)}")
        lines += [f"    FAILED: {what}" for what in one.failed]
    worked = sum(len(one.done) for one in found)
    refused = sum(len(one.refused) for one in found)
    failed = sum(len(one.failed) for one in found)
    sums = f"{worked} things work, {refused} are refused by name, {failed} fail"
    return "\n".join([*lines, "", f"{len(found)} clients: {sums}"])


def say(line: str) -> None:
    """Tell people how far it is."""
    sys.stderr.write(f"{line}\n")


def main() -> int:
    """Try them; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m clients.run", description=__doc__)
    parser.add_argument("--light", type=Path, required=True, help="environment of those in CI")
    parser.add_argument("--heavy", type=Path, help="environment of the others")
    parser.add_argument("--only", action="append", help="the name of one; may be repeated")
    parser.add_argument("--publish", action="store_true", help=f"write {DOCUMENT.name}")
    options = parser.parse_args()
    places = dict.fromkeys(LIGHT, options.light) | dict.fromkeys(HEAVY, options.heavy)
    found: list[Tried] = []
    with endpoint("--memory", "1GiB") as serving:
        for name, folder in places.items():
            if options.only and name not in options.only:
                continue
            if why := lacks(name, folder):
                say(f"{name}: {why}")
                found.append(Tried(name, failed={"start": why}))
                continue
            began_s = time.monotonic()
            tried = try_client(name, folder, serving.url, smollm2.NAME, smollm2.folder())
            found.append(tried)
            say(f"{tried.client or name}: {time.monotonic() - began_s:.0f} s")
            for what, why in tried.failed.items():
                say(f"  {what}: {why}")
    told = table(found)
    sys.stdout.write(f"{told}\n")
    if options.publish:
        publish(DOCUMENT, "clients", f"$ make clients\n{told}")
    return int(any(one.failed for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
