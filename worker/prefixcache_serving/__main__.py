"""`python -m prefixcache_serving` is `prefixcache up`."""

from __future__ import annotations

import signal

_BEFORE = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in an import: no traceback

import sys  # noqa: E402

import typer  # noqa: E402

from prefixcache.errors import CacheError  # noqa: E402
from prefixcache_serving.up import up  # noqa: E402

if __name__ == "__main__":
    try:
        signal.signal(signal.SIGINT, _BEFORE)
        typer.run(up)
    except KeyboardInterrupt:  # before typer listens to it
        sys.exit(130)
    except CacheError as error:
        sys.exit(f"prefixcache: {error}")
