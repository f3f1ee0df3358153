"""Experiments on traces, and benchmarks."""
