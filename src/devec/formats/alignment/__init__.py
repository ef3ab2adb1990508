"""Bringing adapters of different conventions to common modules."""
