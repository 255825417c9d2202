"""What is timed: every op at the shapes that a device of MiMo-V2.5-Pro has, with what a user would run instead."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import interleaved_mxfp4, mxfp4
from pallas_kernels.backends import Backend
from pallas_kernels.fp8_linear import fp8_linear
from pallas_kernels.interleaved_expert_mlp import interleaved_expert_mlp
from pallas_kernels.mxfp4_expert_mlp import mxfp4_expert_mlp
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.window_attention import window_attention

Arrays = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: str
    shape: str
    make: Callable[[np.random.Generator], Arrays]
    """Its arguments without the layer; rows or queries come first."""
    run: dict[str, Callable[..., jax.Array]]
    """By name, ways to compute it from (layer, *arguments); the first is ours, and the second the reference."""
    layers: int
    """Layers that the stacks in `arguments` hold: each call reads another, or a cache would serve it."""
    moved: Callable[[Arrays], float]
    """Bytes that must be moved for a call, given the arguments."""
    flops: Callable[[Arrays], float]
    """Operations of a call."""
    more: dict[str, Callable[[Arrays], Arrays]] = field(default_factory=dict)
    """Peers that take the arguments in another form: from ours to theirs."""


@dataclass(frozen=True)
class Sizes:
    """Of the cases: real ones, or small ones that any machine can run."""

    devices: int
    """Among which experts are divided, whole or sliced."""
    hidden: int
    inner: int
    experts: int
    """Routed, on all devices together."""
    layers: int
    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[tuple[int, int], ...]
    """(batch, committed positions)."""
    window: int
    page: int
    group: int
    """Query heads of a key-value head."""
    linears: tuple[tuple[int, int, int], ...]
    """(inputs, outputs, outputs that share a scale)."""


REAL = Sizes(
    devices=8,
    hidden=6144,
    inner=2048,
    experts=384,
    layers=4,
    tokens=(1, 8, 32, 128, 2048),
    batches=(1, 8, 32, 128),
    contexts=((1, 131072), (8, 16384), (32, 8192), (128, 2048)),
    window=129,
    page=64,
    group=16,
    linears=((6144, 3072, 128), (6144, 192, 64), (6144, 128, 64), (6144, 2048, 128), (2048, 6144, 128)),
)
SMALL = Sizes(
    devices=2,
    hidden=256,
    inner=128,
    experts=16,
    layers=2,
    tokens=(8,),
    batches=(2,),
    contexts=((2, 64),),
    window=17,
    page=16,
    group=4,
    linears=((256, 128, 64),),
)
TOP_K = 8
QK_DIM, V_DIM, ROWS = 192, 128, 8


def cases(sizes: Sizes) -> Iterator[Case]:
    """All of them."""
    for tokens in sizes.tokens:
        yield _experts(sizes, tokens, sizes.devices, sliced=False)
    for tokens in sizes.tokens:
        yield _experts(sizes, tokens, min(sizes.devices, sizes.inner // interleaved_mxfp4.WIDTH), sliced=True)
    for rows in (8, 64):
        for inputs, outputs, tile in sizes.linears:
            yield _linear(sizes, rows, inputs, outputs, tile)
    for batch in sizes.batches:
        yield _window(sizes, batch)
    for batch, context in sizes.contexts:
        yield _paged(sizes, batch, context)


def _experts(sizes: Sizes, tokens: int, devices: int, sliced: bool) -> Case:
    hidden, layers = sizes.hidden, sizes.layers
    inner = sizes.inner // devices if sliced else sizes.inner
    experts = sizes.experts if sliced else sizes.experts // devices

    def make(rng: np.random.Generator) -> Arrays:
        every = np.argsort(rng.uniform(size=(tokens, sizes.experts)), axis=1)[:, :TOP_K]
        ids = jnp.asarray(np.minimum(every, experts), jnp.int32)
        weights = jnp.asarray(rng.uniform(0.05, 0.2, ids.shape), jnp.float32)
        key = jax.random.key(int(rng.integers(1 << 31)))
        gate_up = _packed(key, (layers, experts, 2, inner, hidden))
        down = _packed(jax.random.fold_in(key, 1), (layers, experts, hidden, inner))
        return _rows(rng, tokens, hidden), ids, weights, *_interleaved(*gate_up), *_interleaved(*down)

    def read(arguments: Arrays) -> int:
        ids = np.asarray(arguments[1])
        return len(np.unique(ids[ids < experts]))

    def moved(arguments: Arrays) -> float:
        return read(arguments) * 3 * hidden * inner * (1 / 2 + 1 / 32) + tokens * hidden * (2 + 4)

    def flops(arguments: Arrays) -> float:
        return float((np.asarray(arguments[1]) < experts).sum()) * 6 * hidden * inner

    def run(backend: Backend) -> Callable[..., jax.Array]:
        return lambda layer, *a: interleaved_expert_mlp(*a, layer=layer, routed=sizes.experts, backend=backend)

    def as_stored(arguments: Arrays) -> Arrays:
        gate_up = interleaved_mxfp4.deinterleave(*arguments[3:5])
        return (*arguments[:3], *gate_up, *interleaved_mxfp4.deinterleave(*arguments[5:7]))

    def expanded(arguments: Arrays) -> Arrays:
        """Of one layer: all of them would not fit."""
        gate_up, down = (
            interleaved_mxfp4.decode(w[0], s[0], jnp.bfloat16) for w, s in (arguments[3:5], arguments[5:7])
        )
        return (*arguments[:3], gate_up.reshape(experts, 2 * inner, hidden).swapaxes(1, 2), down.swapaxes(1, 2))

    kind = f"{experts} experts of {inner}"
    return Case(
        "mxfp4 experts",
        f"{tokens} tokens, {kind}",
        make,
        {
            "mosaic_gpu": run("mosaic_gpu"),
            "XLA, expanding an expert at a time": run("reference"),
            "triton": lambda layer, *a: mxfp4_expert_mlp(*a, layer=layer, routed=sizes.experts, backend="triton"),
            "lax.ragged_dot on bfloat16 weights": partial(_ragged_dot, experts),
        },
        layers,
        moved,
        flops,
        {"triton": as_stored, "lax.ragged_dot on bfloat16 weights": expanded},
    )


def _ragged_dot(experts: int, layer: jax.Array, x: jax.Array, ids: jax.Array, weights: jax.Array, *w: jax.Array) -> Any:
    """Experts of one layer by `jax.lax.ragged_dot`; rows of experts elsewhere come last and meet none."""
    gate_up, down = w
    flat = ids.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=experts).astype(jnp.int32)
    rows = x[order // TOP_K]
    gate, up = jnp.split(jax.lax.ragged_dot(rows, gate_up, sizes), 2, axis=-1)
    y = jax.lax.ragged_dot((jax.nn.silu(gate) * up).astype(x.dtype), down, sizes)
    scaled = y.astype(jnp.float32) * weights.reshape(-1)[order][:, None]
    return (
        jnp.zeros(x.shape, jnp.float32).at[order // TOP_K].add(jnp.where((flat[order] < experts)[:, None], scaled, 0))
    )


def _linear(sizes: Sizes, rows: int, inputs: int, outputs: int, tile: int) -> Case:
    layers = max(sizes.layers, math.ceil(2e8 / (inputs * outputs)) if sizes is REAL else 0)  # beyond the caches

    def make(rng: np.random.Generator) -> Arrays:
        values = jax.random.normal(jax.random.key(int(rng.integers(1 << 31))), (layers, outputs, inputs), jnp.bfloat16)
        scales = rng.uniform(0.01, 0.03, (layers, outputs // tile, inputs // 128))
        return _rows(rng, rows, inputs), values.astype(jnp.float8_e4m3fn), jnp.asarray(scales, jnp.float32)

    def run(backend: Backend) -> Callable[..., jax.Array]:
        return lambda layer, *a: fp8_linear(*a, layer=layer, backend=backend)

    return Case(
        "fp8 linear",
        f"{rows} rows, {inputs} to {outputs}",
        make,
        {"mosaic_gpu": run("mosaic_gpu"), "XLA, expanding the weight": run("reference")},
        layers,
        lambda _: inputs * outputs + 2 * rows * (inputs + outputs),
        lambda _: 2 * rows * inputs * outputs,
    )


def _window(sizes: Sizes, batch: int) -> Case:
    layers, slots = sizes.layers, sizes.window + ROWS - 1

    def make(rng: np.random.Generator) -> Arrays:
        key = jax.random.key(int(rng.integers(1 << 31)))
        block = _block(rng, batch, sizes.group)
        ring = (
            jax.random.normal(key, (layers, batch, slots, 1, QK_DIM), jnp.bfloat16),
            jax.random.normal(key, (layers, batch, slots, 1, V_DIM), jnp.bfloat16),
        )
        lengths = jnp.asarray(rng.integers(slots, 100 * slots, batch), jnp.int32)
        sink = jnp.asarray(rng.normal(size=sizes.group), jnp.float32)
        return (block[0], *ring, *block[1:], lengths, sink)

    def run(backend: Backend) -> Callable[..., jax.Array]:
        def call(layer: jax.Array, *a: jax.Array) -> jax.Array:
            *arrays, lengths, sink = a
            return window_attention(
                *arrays,
                layer=layer,
                lengths=lengths,
                visible_keys=sizes.window,
                causal=True,
                sink=sink,
                backend=backend,
            )

        return call

    keys = min(sizes.window - 1, slots) + ROWS
    return Case(
        "window attention",
        f"{batch} x {ROWS} rows, {sizes.group} heads a key-value head",
        make,
        {"mosaic_gpu": run("mosaic_gpu"), "XLA": run("reference")},
        layers,
        lambda _: 2 * batch * ((QK_DIM + V_DIM) * (keys + ROWS * sizes.group)),
        lambda _: 2 * batch * ROWS * sizes.group * keys * (QK_DIM + V_DIM),
    )


def _paged(sizes: Sizes, batch: int, context: int) -> Case:
    columns = context // sizes.page

    def make(rng: np.random.Generator) -> Arrays:
        key = jax.random.key(int(rng.integers(1 << 31)))
        block = _block(rng, batch, sizes.group)
        pages = [
            jax.random.normal(key, (1, batch * columns, sizes.page, 1, dim), jnp.bfloat16) for dim in (QK_DIM, V_DIM)
        ]
        table = jnp.asarray(rng.permutation(batch * columns).reshape(batch, columns), jnp.int32)
        return (block[0], *pages, *block[1:], table, jnp.full(batch, context, jnp.int32))

    def run(backend: Backend) -> Callable[..., jax.Array]:
        def call(layer: jax.Array, *a: jax.Array) -> jax.Array:
            *arrays, table, lengths = a
            return paged_attention(*arrays, layer=layer, page_table=table, lengths=lengths, sink=None, backend=backend)

        return call

    return Case(
        "paged attention",
        f"{batch} x {ROWS} rows, {context} positions, pages of {sizes.page}",
        make,
        {"mosaic_gpu": run("mosaic_gpu"), "XLA": run("reference")},
        1,
        lambda _: 2 * batch * (QK_DIM + V_DIM) * (context + ROWS * sizes.group),
        lambda _: 2 * batch * ROWS * sizes.group * context * (QK_DIM + V_DIM),
    )


def _rows(rng: np.random.Generator, rows: int, width: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=(rows, width)), jnp.bfloat16)


def _block(rng: np.random.Generator, batch: int, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of a block's rows."""
    shapes = (batch, ROWS, heads, QK_DIM), (batch, ROWS, 1, QK_DIM), (batch, ROWS, 1, V_DIM)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    return q, k, v


@partial(jax.jit, static_argnums=1)
def _packed(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Random codes and scales of weights [..., out, in] of about 1 / sqrt(in)."""
    *lead, inputs = shape
    codes = jax.random.bits(key, (*lead, inputs // 2), jnp.uint8)
    middle = 127 - 2 - round(math.log2(math.sqrt(inputs)))
    spread = jax.random.randint(jax.random.fold_in(key, 1), (*lead, inputs // mxfp4.BLOCK), -1, 2)
    return codes, (middle + spread).astype(jnp.uint8)


@jax.jit
def _interleaved(codes: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.lax.map(lambda layer: interleaved_mxfp4.interleave(*layer), (codes, scales))
