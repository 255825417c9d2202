"""The server's package. Nothing is served yet: offline generation is `mimo_jax.Generator` and `mimo-jax generate`."""
