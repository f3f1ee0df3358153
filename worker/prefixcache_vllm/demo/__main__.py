"""`python -m prefixcache_vllm.demo`."""

import typer

from prefixcache_vllm.demo.command import demo

if __name__ == "__main__":
    typer.run(demo)
