"""Splitting a pool of adapters into shared, unique and common parts."""
