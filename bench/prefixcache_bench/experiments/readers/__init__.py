"""Readers of traces: one file per form."""
