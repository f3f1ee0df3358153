"""What routers and later replays are told: changes of the index, and recorded requests."""
