"""The experiments' commands of `prefixcache`; heavy modules are imported inside them."""
