"""The `prefixcache` command: one file per view, everything heavy imported when it is needed."""
