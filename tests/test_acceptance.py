"""Acceptance of drafts: the golden verification cases, and the law of what is emitted."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mimo_jax.sampling import accept_matching, accept_rejection
from tests.conftest import golden_folders, golden_id

CASES = [
    (folder, case["name"])
    for folder in golden_folders("verify_*")
    for case in json.loads((folder / "cases.json").read_text())
]


@pytest.mark.parametrize(("folder", "case"), CASES, ids=[f"{golden_id(f)}-{c}" for f, c in CASES])
def test_rejection_equals_the_reference(folder, case):
    golden = load_file(folder / "golden.safetensors")
    p, q, drafts, uniform, final = (
        golden[f"{case}.{name}"] for name in ("p", "q", "draft_tokens", "uniforms", "final_uniform")
    )
    accepted, extra = accept_rejection(
        jnp.asarray(p), jnp.asarray(q), jnp.asarray(drafts, jnp.int32), jnp.asarray(uniform),
        jnp.broadcast_to(jnp.asarray(final)[:, None], p.shape[:2]),
    )  # fmt: skip
    np.testing.assert_array_equal(accepted, golden[f"{case}.accepted"])
    np.testing.assert_array_equal(extra, golden[f"{case}.next_token"])


def test_matching_counts_the_leading_agreement():
    drafts = jnp.array([[1, 2, 3], [1, 9, 3], [9, 2, 3]])
    targets = jnp.array([[1, 2, 3, 4]] * 3)
    assert accept_matching(drafts, targets).tolist() == [3, 1, 0]
    assert accept_matching(drafts[:, :0], targets[:, :1]).tolist() == [0, 0, 0]


def test_rejection_emits_the_targets_law(seed):
    """First token, and first two jointly, against the exact law, for drafts drawn from another one."""
    from scipy.stats import chisquare

    vocab, rows, n = 5, 3, 200_000
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(vocab), rows), rng.dirichlet(np.ones(vocab), rows - 1)
    drafts = np.stack([rng.choice(vocab, n, p=row) for row in q], axis=1)
    law = jax.jit(accept_rejection)
    accepted, extra = law(
        jnp.broadcast_to(jnp.asarray(p, jnp.float32), (n, rows, vocab)),
        jnp.broadcast_to(jnp.asarray(q, jnp.float32), (n, rows - 1, vocab)),
        jnp.asarray(drafts, jnp.int32),
        jnp.asarray(rng.random((n, rows - 1)), jnp.float32),
        jnp.asarray(rng.random((n, rows)), jnp.float32),
    )
    accepted, extra = np.asarray(accepted), np.asarray(extra)
    first = np.where(accepted > 0, drafts[:, 0], extra)
    assert chisquare(np.bincount(first, minlength=vocab), p[0] * n).pvalue > 1e-4
    two = accepted >= 1
    second = np.where(accepted > 1, drafts[:, 1], extra)[two]
    joint = np.bincount(drafts[two, 0] * vocab + second, minlength=vocab**2)
    expected = np.outer(np.minimum(p[0], q[0]), p[1]).ravel()
    assert chisquare(joint, expected / expected.sum() * two.sum()).pvalue > 1e-4
