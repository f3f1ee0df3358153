"""Stores that several machines share, as a carrier sees them.  One file for each kind."""
