"""From declared modules to plain parameter trees and back.

At run time parameters are a nested dictionary of weights. Inside a trace they are merged into the module that declared
them, which costs tracing time only.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]
"""A nested dictionary whose leaves are weights, shaped as the module that declares them."""


class Declared[M: nnx.Module]:
    """A module built from shapes alone, waiting for parameters."""

    def __init__(self, build: Callable[[], M]):
        self.module = nnx.eval_shape(build)
        self._definition, self._state = nnx.split(self.module)

    @property
    def shapes(self) -> Params:
        """The tree of `jax.ShapeDtypeStruct` that parameters must have before quantisation."""
        return nnx.to_pure_dict(self._state)

    @property
    def axes(self) -> Params:
        """The tree of logical axis names, a tuple of strings a parameter."""
        named = jax.tree.map(
            lambda p: p.get_metadata("axes"), self._state, is_leaf=lambda p: isinstance(p, nnx.Variable)
        )
        return nnx.to_pure_dict(named) if isinstance(named, nnx.State) else named

    def bind(self, params: Params) -> M:
        """The module with these parameters in it."""
        state = jax.tree.map(lambda leaf: leaf, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._definition, state)
