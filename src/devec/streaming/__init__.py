"""Decomposition from files to files, in memory that does not grow with the pool."""
