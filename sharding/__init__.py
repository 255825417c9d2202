"""Placement on many devices: the mesh, the table from logical axes to mesh axes, and processes that work together."""
