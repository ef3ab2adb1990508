"""Benchmarks: ``python -m benchmarks`` runs all timings; experiments are programs of their own."""
