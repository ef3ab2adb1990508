"""A small pool for demonstration: a vision transformer and one adapter for each visual domain."""
