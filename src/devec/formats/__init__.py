"""File formats of adapters: detect, read, write, convert."""
