"""Collectives read from the text of a compiled program."""

from functools import partial

import jax
import jax.numpy as jnp

from sharding.compiled import collectives
from sharding.topology import Topology


def test_kinds_and_bytes_of_a_programs_collectives():
    topology = Topology(4)

    @jax.jit
    @partial(jax.shard_map, mesh=topology.mesh(), in_specs=jax.P(None, "tensor"), out_specs=jax.P(), check_vma=False)
    def program(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.psum(x, "tensor"), jax.lax.all_gather(x.astype(jnp.int32), "tensor", axis=1, tiled=True)

    text = program.lower(jnp.zeros((8, 16), jnp.float32)).compile().as_text()
    assert sorted(collectives(text or "")) == [("all-gather", 8 * 16 * 4), ("all-reduce", 8 * 4 * 4)]


def test_a_program_of_one_device_has_none():
    assert list(collectives(jax.jit(jnp.sin).lower(jnp.zeros(4)).compile().as_text() or "")) == []
