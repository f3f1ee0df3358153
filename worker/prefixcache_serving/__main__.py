"""`python -m prefixcache_serving` is `prefixcache up`."""

import sys

import typer

from prefixcache.errors import CacheError
from prefixcache_serving.up import up

if __name__ == "__main__":
    try:
        typer.run(up)
    except CacheError as error:
        sys.exit(f"prefixcache: {error}")
