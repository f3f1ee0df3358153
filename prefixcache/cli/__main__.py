"""`python -m prefixcache.cli` is `prefixcache`."""

from prefixcache.cli.main import main

main()
