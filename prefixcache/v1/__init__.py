"""Generated from `proto/prefixcache/v1/prefixcache.proto` by `make proto`; a test keeps it fresh."""
