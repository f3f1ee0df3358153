"""Benchmarks: what operations cost, beside a baseline that is measured in the same run."""
