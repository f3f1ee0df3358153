"""What lies below the pool: the memory of the tier, the process that moves bytes, its orders."""
