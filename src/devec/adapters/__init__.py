"""Adapters as values, their algebra, and what they need from file formats."""
