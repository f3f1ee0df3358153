"""`python -m prefixcache_worker` is `prefixcache worker`."""

import typer

from prefixcache_worker.cli import worker

if __name__ == "__main__":
    typer.run(worker)
