"""Experiments on traces: replay, sweeps, curves, policies and bounds."""
