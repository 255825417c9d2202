"""Topologies: what fits, what is refused and why, and what each device holds."""

import json

import jax
import numpy as np
import pytest

from mimo_jax.cli import main
from mimo_jax.params import Declared
from mimo_jax.placement import check, holdings
from mimo_jax.presets import PRESETS
from sharding.topology import Topology, TopologyError
from tests.checkpoint_files import declared_backbone

RELEASE = Topology(
    tensor_parallel=16, data_parallel=2, expert_parallel=16, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1
)


def configs(name):
    return PRESETS[name].configs()


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"tensor_parallel": 0}, "at least 1, not 0"),
        ({"tensor_parallel": 8, "data_parallel": 2}, "2 copies of the model"),
        ({"tensor_parallel": 8, "data_parallel": 3, "dp_attention": True}, "8 devices .* 3 data-parallel groups"),
        ({"tensor_parallel": 16, "expert_parallel": 4}, "expert_parallel 4 .* data=1 x tensor=16; it may be 1, 16"),
        ({"tensor_parallel": 8, "expert_parallel": 16}, "expert_parallel 16"),
        ({"tensor_parallel": 8, "dp_lm_head": True}, "DP LM head needs DP attention"),
        ({"tensor_parallel": 8, "dense_tensor_parallel": 2}, "dense_tensor_parallel 2 is neither 1 .* nor 8"),
    ],
)
def test_numbers_that_do_not_fit_each_other(numbers, said):
    with pytest.raises(TopologyError, match=said):
        Topology(**numbers)


@pytest.mark.parametrize(
    ("preset", "topology", "said"),
    [
        ("mimo-v2.5-pro", Topology(24, expert_parallel=24), "128 heads of full attention .* 24"),
        ("mimo-v2.5-pro", Topology(128), "inner size of 2048 .* 128 equal parts of whole blocks of 32"),
        ("mimo-v2.5-pro", Topology(512, 4, 512, dp_attention=True, dp_lm_head=True), "384 experts .* 512 equal parts"),
        ("nano", Topology(4, expert_parallel=4), "dense inner size of 768 .* whole blocks of 128"),
        ("tiny", Topology(32, expert_parallel=32), "heads"),
    ],
)
def test_models_that_do_not_fit(preset, topology, said):
    with pytest.raises(TopologyError, match=said):
        check(topology, *configs(preset))


def test_the_releases_topology():
    config, drafter = configs("mimo-v2.5-pro")
    check(RELEASE, config, drafter)
    found = holdings(RELEASE, config)
    assert [(h.device, h.data, h.tensor) for h in found] == [(i, i // 8, i % 8) for i in range(16)]
    for h in found:
        assert h.heads == (16 * h.tensor, 16 * h.tensor + 16)
        assert h.kv_heads == {"full": (h.tensor, h.tensor + 1), "swa": (h.tensor, h.tensor + 1)}
        assert h.experts == (24 * h.device, 24 * h.device + 24)
        assert h.expert_columns == (0, 2048)
        assert h.vocabulary == (19072 * h.tensor, 19072 * h.tensor + 19072)
        assert h.dense_columns == (0, 16384)


@pytest.mark.parametrize("expert_parallel", [1, 2, 4, 8])
@pytest.mark.parametrize("dp_lm_head", [False, True])
def test_holdings_are_what_jax_places(expert_parallel, dp_lm_head):
    """The ranges of every device equal those of arrays placed by the rules, and together cover everything once."""
    topology = Topology(8, 2, expert_parallel, dp_attention=True, dp_lm_head=dp_lm_head, dense_tensor_parallel=1)
    config = configs("mimo-v2.5-pro")[0]
    mesh = topology.mesh()
    shape = (config.moe.experts, config.moe.intermediate)
    experts = topology.sharding(mesh, ("expert", "expert_inner"), shape).devices_indices_map(shape)
    words = (config.vocab_size,)
    rows = topology.sharding(mesh, ("vocab",), words).devices_indices_map(words)
    seen = np.zeros(shape, int)
    for one, device in zip(holdings(topology, config), mesh.devices.flat, strict=True):
        assert _ranges(experts[device], shape) == [one.experts, one.expert_columns]
        assert _ranges(rows[device], words) == [one.vocabulary]
        seen[slice(*one.experts), slice(*one.expert_columns)] += 1
    assert (seen == 1).all()


def _ranges(index, shape):
    return [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]


def test_what_does_not_divide_is_refused():
    topology = Topology(8)
    mesh = topology.mesh()
    assert topology.sharding(mesh, ("heads", "embed"), (16, 6)).spec == jax.P("tensor", None)
    assert topology.spec((None, "heads"), (6, 16)) == jax.P(None, "tensor")
    with pytest.raises(TopologyError, match="heads of size 6 cannot be cut into 8 equal parts"):
        topology.sharding(mesh, ("heads", "embed"), (6, 6))
    with pytest.raises(KeyError, match="colour"):
        topology.sharding(mesh, ("colour",), (8,))


@pytest.mark.parametrize(("width", "kv_heads"), [(2, (0, 4)), (8, (0, 1)), (16, (0, 1))])
def test_kv_heads_are_shared_only_beyond_their_number(width, kv_heads):
    found = holdings(Topology(width), configs("mimo-v2.5-pro")[0])
    assert found[0].kv_heads["full"] == kv_heads
    holders = [h.device for h in found if h.kv_heads["full"][0] == 0]
    assert len(holders) == max(1, width // 8)


def test_every_logical_axis_has_a_rule():
    declared: Declared = declared_backbone(configs("tiny")[0])
    named = {axis for axes in jax.tree.leaves(declared.axes, is_leaf=lambda x: isinstance(x, tuple)) for axis in axes}
    assert named <= set(RELEASE.rules)


def test_a_mesh_needs_its_devices():
    with pytest.raises(TopologyError, match="data=1 x tensor=64 needs 64 devices, found"):
        Topology(64).mesh()


def test_every_process_takes_part(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert Topology(16).mesh().size == 16
    with pytest.raises(TopologyError, match="2 processes have 16 devices in all, and tensor_parallel is 4"):
        Topology(4).mesh()


def test_the_command_draws_and_refuses(capsys):
    given = ["topology", "--preset", "mimo-v2.5-pro", "--tp-size", "16", "--ep-size", "16", "--dp-size", "2"]
    given += ["--enable-dp-attention", "--enable-dp-lm-head", "--moe-dense-tp-size", "1"]
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert "data 2 x tensor 8" in shown
    assert "360-383" in shown
    assert main([*given, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["mesh"] == {"data": 2, "tensor": 8}
    assert described["devices"][15]["experts"] == [360, 383 + 1]
    assert main(["topology", "--preset", "nano", "--tp-size", "3"]) == 2
    assert "8 heads of full attention cannot be cut into 3" in capsys.readouterr().err
