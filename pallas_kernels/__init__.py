"""Arithmetic on one device: plain arrays in and out, no model types.

An op that has kernels is a folder (see `backends`), one that has none a file. Its reference in plain `jnp` is also the
portable fallback.
"""
