"""Copying from the first step: an induction circuit, set by hand where parameters begin.

Heads of the first sliding-window layer look one position back and write which token stands there; heads of the next
full layer look for places that follow the current token's earlier occurrences, and pass on the token they find there.
Large models form this by themselves after billions of tokens (Olsson et al. 2022, arXiv:2209.11895); a small one does
not within the few million it is given, but keeps it when it is there to begin with (as attention initialised after
trained patterns in general: Trockman and Kolter 2023, arXiv:2305.09828). All of it goes on being trained.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import AttentionConfig, BackboneConfig
from mimo_jax.params import Params

LOOK_BACK = 20.0
"""Attention score of the previous position, of which the one before it lacks a half."""
MATCH = 8.0
"""Attention score, about, of a place whose previous token is the current one; others have about 0."""
PASS_ON = 2.0
"""Gain of what the heads write to the residual stream."""


def with_induction(params: Params, config: BackboneConfig, seed: int) -> Params:
    """Initial parameters of a backbone with the circuit in its first sliding-window layer and the next full one.

    Args:
        params: As `initial_params` gives them, arrays of any kind.
        config: Of the backbone. Where no full layer follows a sliding-window one, `params` are given back as they are.
        seed: Of the projections the circuit speaks through.
    """
    kinds = [layer.attention for layer in config.layers]
    back = kinds.index("swa") if "swa" in kinds else len(kinds)
    if "full" not in kinds[back:]:
        return params
    copying = kinds.index("full", back)
    rng = np.random.default_rng(seed)
    hidden = config.hidden_size
    params = jax.tree.map(np.array, params)

    # one constant dimension, for heads that attend by position alone; nothing else of the circuit reads it
    constant = hidden**0.5 / 4
    params["embedding"][:, 0] = 0
    turn = _orthonormal(rng, hidden, hidden)
    # the head reads tokens turned, so that what stands in the residual stream already does not speak for itself
    params["lm_head"] = params["embedding"] @ turn * hidden**-0.5
    params["embedding"][:, 0] = constant

    first, second = _attention(params, config, back), _attention(params, config, copying)
    a, b = config.attention("swa"), config.attention("full")
    width = min(a.v_dim, b.qk_dim - b.rotary_dim)
    for kv in range(min(a.kv_heads, b.kv_heads)):
        token, value = (_token_code(rng, n, hidden) for n in (width, b.v_dim))
        before = _orthonormal(rng, width, hidden)  # where in the residual stream the previous token's code is written
        look_back = _look_back(a) * (LOOK_BACK * a.qk_dim**0.5) ** 0.5 / constant
        _set(first, a, kv, q=_column(look_back[0], hidden), k=_column(look_back[1], hidden), v=token, o=before.T)
        match = np.zeros((2, b.qk_dim, hidden))
        match[:, b.rotary_dim : b.rotary_dim + width] = token * MATCH * b.qk_dim**0.5 / width, before
        _set(second, b, kv, q=match[0], k=match[1], v=value, o=(value @ turn).T)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def _attention(params: Params, config: BackboneConfig, layer: int) -> dict[str, np.ndarray]:
    """Views of one layer's attention weights [out, in]."""
    kind = config.layers[layer]
    stack = params["layers"][kind.name]["attention"]
    return {name: stack[name][config.layers_of(kind).index(layer)] for name in ("q", "k", "v", "o")}


def _set(
    attention: dict[str, np.ndarray],
    config: AttentionConfig,
    kv: int,
    *,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    o: np.ndarray,
) -> None:
    """Set a KV head and the first query head of its group; v and o may have fewer than v_dim rows and columns."""
    head = kv * (config.heads // config.kv_heads)
    rows = kv * config.v_dim
    attention["q"][head * config.qk_dim : (head + 1) * config.qk_dim] = q
    attention["k"][kv * config.qk_dim : (kv + 1) * config.qk_dim] = k
    attention["v"][rows : rows + len(v)] = v
    attention["o"][:, head * config.v_dim : head * config.v_dim + len(v)] = o * PASS_ON


def _look_back(config: AttentionConfig) -> np.ndarray:
    """[2, qk_dim]: a query and a key which RoPE turns to agree best one position apart."""
    half = config.rotary_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    # fast turns tell neighbours apart, the next ones the fast turns' periods
    weights = np.array([1.0, 1.0, 0.5] + [0.1] * half)[:half]
    rest = np.zeros(config.qk_dim - 2 * half)
    query = np.concatenate([np.cos(frequencies) * weights**0.5, -np.sin(frequencies) * weights**0.5, rest])
    key = np.concatenate([weights**0.5, np.zeros(half), rest])
    return np.stack([query, key])


def _column(values: np.ndarray, hidden: int) -> np.ndarray:
    """[rows, hidden] that reads the constant dimension alone."""
    out = np.zeros((len(values), hidden))
    out[:, 0] = values
    return out


def _token_code(rng: np.random.Generator, width: int, hidden: int) -> np.ndarray:
    """[width, hidden] orthonormal rows but for the constant dimension, which they do not read."""
    rows = _orthonormal(rng, width, hidden)
    rows[:, 0] = 0
    return rows


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random orthonormal rows."""
    return np.linalg.qr(rng.normal(size=(columns, rows)))[0].T
