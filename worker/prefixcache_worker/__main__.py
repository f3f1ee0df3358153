"""`python -m prefixcache_worker` is `prefixcache worker`."""

import sys

import typer

from prefixcache.errors import CacheError
from prefixcache_worker.cli import worker

if __name__ == "__main__":
    try:
        typer.run(worker)
    except KeyboardInterrupt:  # before typer listens to it
        sys.exit(130)
    except CacheError as error:
        sys.exit(f"prefixcache: {error}")
