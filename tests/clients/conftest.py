"""What stands in `scripts` is run by the clients' own Python, not by this one."""

collect_ignore_glob = ["scripts/*"]
