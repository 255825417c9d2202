"""Muon on matrices, AdamW on the rest, and the router's correction bias by the sign of its load.

Which parameter is which follows from the logical axes it was declared with.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from mimo_jax.params import Params

STACKED = frozenset({"layers", "expert", "gate_up"})
"""Axes that number whole matrices; Muon orthogonalises each matrix by itself."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters move."""

    name: Literal["muon", "adamw"] = "muon"
    """What matrices are trained with."""
    learning_rate: float = 2e-3
    """Peak; Muon's updates have the size of AdamW's (0.2 root-mean-square), so one rate serves both."""
    warmup: int = 50
    """Steps of linear warm-up, before a cosine to `final` of the peak."""
    final: float = 0.1
    """1 keeps the peak, for a run that another goes on from."""
    weight_decay: float = 0.1
    """Decoupled, of matrices only."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    balance_rate: float = 1e-3
    """Step of the router's correction bias."""


def is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether a parameter is a stack of hidden matrices [out, in]: neither embedding nor head, router, norm or sink."""
    return not {"vocab", "choices"} & {*axes} and len([a for a in axes if a not in STACKED]) == 2


def matrices(axes: Params) -> Params:
    """The tree of `MuonDimensionNumbers` of every matrix, None for other parameters."""

    def numbers(names: tuple[str, ...]) -> MuonDimensionNumbers | None:
        return MuonDimensionNumbers(len(names) - 1, len(names) - 2) if is_matrix(names) else None

    return jax.tree.map(numbers, axes, is_leaf=_is_axes)


def make_optimizer(axes: Params, config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser of parameters declared with these axes, for a run of `steps`."""
    warmup = min(config.warmup, steps // 2)
    peak = config.learning_rate
    rate = optax.warmup_cosine_decay_schedule(
        peak / max(1, warmup), peak, warmup, max(steps, warmup + 1), peak * config.final
    )
    numbers = matrices(axes)
    if config.name == "muon":
        moved = muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b2=0.95,
            muon_weight_dimension_numbers=lambda params: _masked_like(params, numbers),
            consistent_rms=0.2,
        )
    else:
        decayed = jax.tree.map(is_matrix, axes, is_leaf=_is_axes)
        moved = optax.adamw(
            rate, b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=lambda params: _masked_like(params, decayed)
        )
    return optax.partition(
        {
            "learned": optax.chain(optax.clip_by_global_norm(config.clip), moved),
            "balanced": optax.chain(optax.scale_by_sign(), optax.scale(-config.balance_rate)),
        },
        jax.tree_util.tree_map_with_path(
            lambda path, _: "balanced" if path[-1].key == "correction_bias" else "learned", axes, is_leaf=_is_axes
        ),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step of training changes."""

    params: Params
    optimizer: optax.OptState


def descend(optimizer: optax.GradientTransformation, state: TrainState, gradients: Params) -> TrainState:
    """The state after a step along these gradients."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes Python numbers with integer counts
        updates, inner = optimizer.update(gradients, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
    return TrainState(params, inner)


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple)


def _masked_like(params: Any, tree: Params) -> Any:
    """`tree` with what `optax.partition` masked in `params` masked too."""

    def same(path: tuple, _: Any) -> Any:
        value: Any = tree
        for key in path:
            value = value[key.key]
        return value

    return jax.tree_util.tree_map_with_path(same, params)
