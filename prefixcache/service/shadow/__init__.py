"""Other caches that play the live requests, in a process beside the service."""
