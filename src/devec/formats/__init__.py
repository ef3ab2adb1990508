"""File formats of adapters: detecting, reading, writing, converting."""
