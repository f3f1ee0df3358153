"""Who is calling, what he may do and see, and for how long that holds."""
