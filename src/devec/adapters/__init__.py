"""Adapters as values, their algebra and alignment, and the interfaces of file formats."""
