"""Arithmetic on one device: plain arrays in and out, no model types.

Each op is one file with the public function and its reference in plain `jnp`, which is also the portable fallback.
"""
