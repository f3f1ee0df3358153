"""Generated from `proto/prefixcache/v1/prefixcache.proto` by `make proto`; tests keep it fresh."""
