"""The decisions, pure: no clock, no I/O, no randomness, no thread; `now` is passed in."""
