"""SwiGLU experts over routed tokens: only the experts that some token chose are touched, one tile of rows at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.precision import matmul_precision

MIN_TILE, MAX_TILE = 8, 128


def expert_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    expert: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    experts: int,
    routed: int | None = None,
) -> jax.Array:
    """Sum over each token's experts of weight * down(silu(gate x) * up x), accumulated in float32.

    Experts numbered `experts` and more are elsewhere, and add nothing.

    Args:
        x: [tokens, hidden].
        ids: [tokens, top_k] int32, each token's experts, none below 0.
        weights: [tokens, top_k] float32, their routing weights.
        expert: Given an expert's id (scalar int32), its gate and up [2, hidden, inner] and its down [inner, hidden] in
            x's dtype. Called once an expert and tile of rows, so packed weights are expanded one expert at a time.
        experts: Their number.
        routed: Experts that all ids are spread over, those elsewhere included; decides how many rows run at a time.
            Default: `experts`.

    Returns:
        [tokens, hidden] float32. No token is dropped, whatever the routing.
    """
    if x.shape[0] <= MIN_TILE:
        return _few_tokens(x, ids, weights, expert, experts)
    plan = _tiles(ids, experts, routed or experts)

    def add_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        e, pair, token = plan.tile(i)
        gate_up, down = expert(e)
        rows = x.at[token].get(mode="fill", fill_value=0)
        y = _swiglu(rows, gate_up, down)
        scaled = y.astype(jnp.float32) * weights.reshape(-1)[pair][:, None]
        return out.at[token].add(scaled, mode="drop")

    return jax.lax.fori_loop(0, plan.count, add_tile, jnp.zeros(x.shape, jnp.float32))


def _few_tokens(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    expert: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    experts: int,
) -> jax.Array:
    """`expert_mlp` where one tile holds all tokens: each chosen expert takes them as they lie."""
    chosen = jax.nn.one_hot(ids, experts, dtype=jnp.float32)  # [tokens, top_k, experts]
    share = jnp.einsum("tke,tk->et", chosen, weights, precision=jax.lax.Precision.HIGHEST)[..., None]
    some = jnp.any(chosen != 0, axis=(0, 1))
    chosen_first = jnp.argsort(~some)

    def add_expert(i: jax.Array, out: jax.Array) -> jax.Array:
        e = chosen_first[i]
        y = _swiglu(x, *expert(e)).astype(jnp.float32)
        # what an expert gives a token that did not choose it may be no number
        return out + jnp.where(share[e] != 0, y * share[e], 0.0)

    return jax.lax.fori_loop(0, jnp.sum(some), add_expert, jnp.zeros(x.shape, jnp.float32))


def _swiglu(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """[tokens, hidden] through one expert, whose weights lie inputs first."""
    gate, up = _product("gti,gio->gto", jnp.broadcast_to(x, (2, *x.shape)), gate_up)
    return _product("ti,io->to", (jax.nn.silu(gate) * up).astype(x.dtype), down)


class _Tiles(NamedTuple):
    """Routed (token, expert) pairs, sorted by expert and cut into tiles of rows of one expert."""

    order: jax.Array
    """[pairs] int32: pairs by expert."""
    sizes: jax.Array
    """[experts] int32: pairs of each expert."""
    tokens: int
    top_k: int
    rows: int
    """Rows of a tile."""

    @property
    def ends(self) -> jax.Array:
        """[experts] int32: tiles of the experts up to and including each."""
        return jnp.cumsum(-(-self.sizes // self.rows))

    @property
    def count(self) -> jax.Array:
        """Number of tiles."""
        return self.ends[-1]

    def tile(self, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Expert of tile i, its pairs [rows] and their tokens [rows]; rows beyond its end have a token out of range."""
        ends, pair_ends = self.ends, jnp.cumsum(self.sizes)
        e = jnp.searchsorted(ends, i, side="right")
        before = ends[e] - -(-self.sizes[e] // self.rows)  # tiles of earlier experts
        at = pair_ends[e] - self.sizes[e] + (i - before) * self.rows + jnp.arange(self.rows)
        pair = self.order[jnp.minimum(at, self.order.size - 1)]
        return e, pair, jnp.where(at < pair_ends[e], pair // self.top_k, self.tokens)


def _tiles(ids: jax.Array, experts: int, routed: int) -> _Tiles:
    tokens, top_k = ids.shape
    rows = MIN_TILE
    while rows < MAX_TILE and rows * routed < ids.size:
        rows *= 2
    flat = ids.reshape(-1)
    return _Tiles(jnp.argsort(flat), jnp.bincount(flat, length=experts), tokens, top_k, rows)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def plain_expert_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    layer: jax.Array | int,
    routed: int | None = None,
) -> jax.Array:
    """`expert_mlp` on stacked plain weights, of which only the chosen experts of one layer are read; has gradients.

    Args:
        x: [tokens, hidden].
        ids: [tokens, top_k] int32.
        weights: [tokens, top_k] float32.
        gate_up: [layers, experts, 2, inner, hidden]; gate is 0, up is 1.
        down: [layers, experts, hidden, inner].
        layer: Scalar int32: the row of the leading axis to use.
        routed: As in `expert_mlp`.

    Returns:
        [tokens, hidden] float32.
    """

    def expert(e: jax.Array) -> tuple[jax.Array, jax.Array]:
        return inputs_first(gate_up[layer, e].astype(x.dtype)), inputs_first(down[layer, e].astype(x.dtype))

    return expert_mlp(x, ids, weights, expert, gate_up.shape[1], routed)


def _plain_forward(*arguments: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return plain_expert_mlp(*arguments), arguments[:-1]


def _plain_backward(
    routed: int | None, arguments: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, None, jax.Array, jax.Array, jax.Array, None]:
    """Walk the same tiles again, computing what the forward pass did not keep."""
    x, ids, weights, gate_up, down, layer = arguments
    plan = _tiles(ids, gate_up.shape[1], routed or gate_up.shape[1])

    def add_tile(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_x, d_weights, d_gate_up, d_down = sums
        e, pair, token = plan.tile(i)
        w_in, w_out = gate_up[layer, e].astype(x.dtype), down[layer, e].astype(x.dtype)
        rows, d_out = (a.at[token].get(mode="fill", fill_value=0).astype(x.dtype) for a in (x, gradient))
        (gate, up), silu = _product("ti,goi->gto", rows, w_in), jax.nn.silu
        activated, of_gate = jax.vjp(silu, gate)
        inner = activated * up
        d_y = d_out * weights.reshape(-1)[pair][:, None].astype(x.dtype)
        d_inner = _product("to,oi->ti", d_y, w_out)
        d_both = jnp.stack([of_gate(d_inner * up)[0], d_inner * activated])
        d_weight = jnp.sum((_product("ti,oi->to", inner, w_out) * d_out).astype(jnp.float32), axis=-1)
        at = jnp.where(token < plan.tokens, pair, ids.size)  # out of range: dropped
        return (
            d_x.at[token].add(_product("gto,goi->ti", d_both, w_in).astype(jnp.float32), mode="drop"),
            d_weights.at[at].add(d_weight, mode="drop"),
            d_gate_up.at[layer, e].add(_product("gto,ti->goi", d_both, rows).astype(d_gate_up.dtype)),
            d_down.at[layer, e].add(_product("to,ti->oi", d_y, inner).astype(d_down.dtype)),
        )

    zeros = (jnp.zeros(x.shape, jnp.float32), jnp.zeros(ids.size, jnp.float32))
    sums = (*zeros, jnp.zeros_like(gate_up), jnp.zeros_like(down))
    d_x, d_weights, d_gate_up, d_down = jax.lax.fori_loop(0, plan.count, add_tile, sums)
    return d_x.astype(x.dtype), None, d_weights.reshape(weights.shape).astype(weights.dtype), d_gate_up, d_down, None


plain_expert_mlp.defvjp(_plain_forward, _plain_backward)


def inputs_first(w: jax.Array) -> jax.Array:
    """[..., out, in] as [..., in, out]."""
    return jnp.swapaxes(w, -1, -2)


def _product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    y = jnp.einsum(spec, x, w, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
