"""Experiments and timings: run one with ``python -m benchmarks.NAME``."""
