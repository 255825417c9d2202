"""What parameters begin with."""

import jax
import jax.numpy as jnp

from mimo_jax.params import Declared, Params


def initial_params(declared: Declared, layers: int, seed: int) -> Params:
    """Normal weights of standard deviation fan_in ** -0.5, float32.

    Writes to the residual stream are smaller by the square root of twice the number of layers, embeddings have standard
    deviation 1, norms are one; sinks, correction biases and the mask vector are zero.

    Args:
        declared: The module.
        layers: Its number of layers.
        seed: Of all values.
    """
    writes = (2 * layers) ** -0.5

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.ones(shape.shape, jnp.float32)
        if name in ("sink", "correction_bias", "mask_embedding"):
            return jnp.zeros(shape.shape, jnp.float32)
        fan_in = 1 if name == "embedding" else shape.shape[-1]
        scale = writes if name in ("o", "down") else 1.0
        return jax.random.normal(key, shape.shape, jnp.float32) * scale * fan_in**-0.5

    leaves, structure = jax.tree.flatten(declared.shapes)
    keys = jax.tree.unflatten(structure, list(jax.random.split(jax.random.key(seed), len(leaves))))
    return jax.tree_util.tree_map_with_path(leaf, declared.shapes, keys)


def initial_drafter(declared: Declared, embedding: jax.Array, seed: int) -> Params:
    """The same for a drafter, whose mask vector begins as the mean of its backbone's embedding [vocab, hidden]."""
    params = initial_params(declared, declared.module.config.num_layers, seed)
    return params | {"mask_embedding": jnp.mean(embedding, axis=0, dtype=jnp.float32)}
