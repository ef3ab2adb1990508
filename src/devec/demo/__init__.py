"""A small, real pool: one vision transformer, and one adapter for every look of the digits."""
