"""Rows reach their experts on a mesh, by sum and by exchange: what one device computes, however they are routed."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mimo_jax.expert_dispatch import by_exchange, by_sum, messages, on_all_devices
from pallas_kernels.expert_mlp import plain_expert_mlp
from sharding.topology import Topology

EXPERTS, HIDDEN, INNER, TOP_K = 8, 12, 16, 3

EP = Topology(4, 1, 4)
SLICES = Topology(4, 1, 1)
GROUPS_EP = Topology(8, 2, 8, dp_attention=True)
EP_IN_GROUPS = Topology(8, 2, 4, dp_attention=True)  # whole experts over tensor, slices over data
GROUPS_OF_SLICES = Topology(8, 2, 2, dp_attention=True)  # whole experts over data, slices over tensor
ONLY_GROUPS = Topology(4, 4, 4, dp_attention=True)

one_device = jax.jit(plain_expert_mlp)


def routed(way, rng, rows):
    """Ids and weights of rows: evenly, all to the same experts, or only to the last device's."""
    if way == "even":
        ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(rows)])
    else:
        first = 0 if way == "one" else EXPERTS - TOP_K
        ids = np.tile(np.arange(first, first + TOP_K), (rows, 1))
    return ids.astype(np.int32), rng.uniform(size=(rows, TOP_K)).astype(np.float32)


@cache
def on_mesh(way, topology):
    def local(x, ids, weights, gate_up, down):
        def mlp(x, ids, weights):
            return plain_expert_mlp(x, ids, weights, gate_up[None], down[None], jnp.int32(0))

        return way(x, ids, weights, EXPERTS, topology, mlp)

    rows = jax.P("data", None)
    expert, inner = topology.rules["expert"], topology.rules["expert_inner"]
    specs = (rows, rows, rows, jax.P(expert, None, inner, None), jax.P(expert, None, inner))
    on_all = jax.shard_map(local, mesh=topology.mesh(), in_specs=specs, out_specs=rows, check_vma=False)
    return jax.jit(on_all)


@pytest.fixture(scope="module")
def experts():
    rng = np.random.default_rng(7)
    shapes = (EXPERTS, 2, INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


WAYS = [
    (by_sum, SLICES),
    *((way, t) for way in (by_sum, by_exchange) for t in (EP, GROUPS_EP, EP_IN_GROUPS, GROUPS_OF_SLICES)),
    (by_exchange, ONLY_GROUPS),
]


@pytest.mark.parametrize("rows", [8, 40])
@pytest.mark.parametrize(("way", "topology"), WAYS)
def test_equal_to_one_device(way, topology, rows, experts, rng):
    gate_up, down = experts
    for routing in ("even", "one", "last"):
        x = rng.normal(size=(rows, HIDDEN)).astype(np.float32)
        ids, weights = routed(routing, rng, rows)
        expected = one_device(x, ids, weights, gate_up[None], down[None], 0)
        got = on_mesh(way, topology)(x, ids, weights, *experts)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("way", "topology"),
    [
        (by_exchange, GROUPS_EP),
        pytest.param(by_sum, GROUPS_EP, marks=pytest.mark.slow),
        pytest.param(by_exchange, EP_IN_GROUPS, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_one_device(way, topology, experts, rng):
    """Of rows, routing weights and experts, which training needs."""
    x = rng.normal(size=(8, HIDDEN)).astype(np.float32)
    ids, weights = routed("even", rng, 8)
    wanted = rng.normal(size=(8, HIDDEN)).astype(np.float32)

    def loss(run, x, weights, gate_up, down):
        return jnp.sum(wanted * run(x, ids, weights, gate_up, down))

    def alone(x, ids, weights, gate_up, down):
        return plain_expert_mlp(x, ids, weights, gate_up[None], down[None], 0)

    found = (
        jax.jit(jax.grad(partial(loss, run), argnums=(0, 1, 2, 3)))(x, weights, *experts)
        for run in (on_mesh(way, topology), alone)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *found)


def test_rows_that_do_not_divide_among_the_devices_that_share_them(experts, rng):
    x = rng.normal(size=(5, HIDDEN)).astype(np.float32)
    ids, weights = routed("even", rng, 5)
    got, expected = (on_mesh(way, EP)(x, ids, weights, *experts) for way in (by_exchange, by_sum))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_few_rows_go_by_sum_and_many_by_exchange():
    """The release's sizes on its mesh: an exchange is worth its messages beyond some hundred rows."""
    release = Topology(16, 2, 16, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1)
    by_sum_bytes, by_exchange_bytes = (sum(m.sent for m in sent) for sent in messages(release, 1, 6144, 8, 2).values())
    # rows, ids and weights to the other group, sums back from it, and a sum within the group, all float32 but the rows
    assert by_sum_bytes == 6144 * (2 + 4 + 2 * 7 / 8 * 4) + 2 * 8 * 4
    assert by_exchange_bytes < by_sum_bytes
    lowered = partial(_collectives, release)
    assert "all_to_all" not in lowered(rows=2 * 8 * 8)
    assert "all_to_all" in lowered(rows=2 * 2048)
    assert list(messages(Topology(8), 4096, 6144, 8, 2)) == ["sum"], "slices of every expert have nowhere else to go"


@pytest.mark.parametrize(("way", "topology"), WAYS)
def test_messages_are_those_of_the_program(way, topology, experts):
    """In kind and number; but for an exchange's counts of rows, which go by themselves."""
    found = messages(topology, 8, HIDDEN, TOP_K, 4)["sum" if way is by_sum else "exchange"]
    data = topology.data_parallel
    shapes = ((data * 8, HIDDEN), jnp.float32), ((data * 8, TOP_K), jnp.int32), ((data * 8, TOP_K), jnp.float32)
    text = str(jax.make_jaxpr(on_mesh(way, topology))(*(jax.ShapeDtypeStruct(*s) for s in shapes), *experts))
    primitives = {
        "all-gather": "all_gather[",
        "reduce-scatter": "reduce_scatter[",
        "all-reduce": "psum[",
        "all-to-all": "ragged_all_to_all[",
    }
    counted = {kind: text.count(f" {primitive}") for kind, primitive in primitives.items()}
    assert counted == {kind: sum(m.count for m in found if m.kind == kind) for kind in primitives}


def _collectives(topology, rows):
    """The program of one layer's dispatch, for shapes of the release."""
    mesh = jax.sharding.AbstractMesh(tuple(topology.axes.values()), tuple(topology.axes), (AxisType.Auto,) * 2)

    def local(x, ids, weights):
        return on_all_devices(x, ids, weights, 384, topology, lambda x, ids, weights: x.astype(jnp.float32))

    spec = jax.P("data", None)
    on_all = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    shapes = ((rows, 6144), jnp.bfloat16), ((rows, 8), jnp.int32), ((rows, 8), jnp.float32)
    return str(jax.make_jaxpr(on_all)(*(jax.ShapeDtypeStruct(*s) for s in shapes)))
