"""Every layer is run once and in order, by loops whose times differ in nothing but where they stand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.config import LayerKind
from mimo_jax.layer_loops import runs, stretches
from mimo_jax.presets import PRESETS

KINDS = LayerKind("swa", "moe"), LayerKind("full", "moe"), LayerKind("full", "dense"), LayerKind("swa", "dense")


def test_runs_cover_layers_in_order_and_end_at_captured_ones():
    a, b, c = LayerKind("swa", "moe"), LayerKind("full", "moe"), LayerKind("full", "dense")
    layers = (c, a, a, a, b, b, a)
    got = list(runs(layers, (2, 4, 6)))
    assert [(r.kind, r.first, r.first_in_cache, r.count, r.captured) for r in got] == [
        (c, 0, 0, 1, False),
        (a, 0, 0, 2, True),
        (a, 2, 2, 1, False),
        (b, 0, 1, 1, True),
        (b, 1, 2, 1, False),
        (a, 3, 3, 1, True),
    ]


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=24), st.sets(st.integers(0, 23)))
def test_stretches_are_the_runs_in_order(kinds, capture):
    layers, capture = tuple(kinds), tuple(sorted(i for i in capture if i < len(kinds)))
    loops = list(stretches(layers, capture))
    assert [run for loop in loops for time in loop for run in time] == list(runs(layers, capture))
    for loop in loops:
        for i, time in enumerate(loop):
            for first, second, run in zip(loop[0], loop[:2][-1], time, strict=True):
                there = first.repeated(second, i)
                assert (there.kind, there.count) == (run.kind, run.count)
                assert (there.first, there.first_in_cache) == (run.first, run.first_in_cache)


@pytest.mark.parametrize(("preset", "bodies"), [("mimo-v2.5-pro", 7), ("mimo-v2.5", 5), ("mimo-v2-flash", 5)])
def test_the_family_has_few_bodies(preset, bodies):
    config, drafter = PRESETS[preset].configs()
    loops = stretches(config.layers, drafter.target_layer_ids if drafter else ())
    assert sum(len(loop[0]) for loop in loops) == bodies
