"""Alignment: expressing adapters of different conventions in common modules, exactly.

What one convention stores as one module may be several in another. Modules are cut into the
coarsest slices that every adapter and the output convention can express: rows of B are sliced, and
A is shared. When they are written, the slices of a module are joined again.
"""
