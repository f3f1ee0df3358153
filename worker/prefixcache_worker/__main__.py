"""`python -m prefixcache_worker` is `prefixcache worker`."""

import typer

from prefixcache_worker.cli import worker

typer.run(worker)
