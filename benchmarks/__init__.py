"""Experiments and timings: all timings with ``python -m benchmarks``, one program by its name."""
