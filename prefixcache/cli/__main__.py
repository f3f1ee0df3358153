"""`python -m prefixcache.cli` is `prefixcache`."""

from prefixcache.cli.main import main

if __name__ == "__main__":
    main()
