"""Placement on many devices: the mesh, and the table from logical axes to mesh axes."""
