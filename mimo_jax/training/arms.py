"""Ways to train a drafter that differ from a base in one choice each."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mimo_jax.config import DrafterConfig
from mimo_jax.training.anchors import Choice
from mimo_jax.training.block_losses import Loss


@dataclass(frozen=True)
class Arm:
    """How a drafter is trained; what is not said is as in the base."""

    optimizer: Literal["muon", "adamw"] = "muon"
    loss: Loss = "hard"
    gamma: float = 7.0
    choice: Choice = "random"
    layers: int | None = None
    """Captured layers: so many of the drafter's own, the first and the last among them; of one, the last."""
    block: int | None = None
    answers: Literal["own", "documents"] = "own"
    """The backbone's, or those that the prompts' documents hold."""

    def config(self, base: DrafterConfig) -> DrafterConfig:
        """The drafter's."""
        ids, block = base.target_layer_ids, base.block_size if self.block is None else self.block
        if self.layers is not None:
            count = min(self.layers, len(ids))
            ids = tuple(ids[round(i)] for i in np.linspace(len(ids) - 1, 0, count)[::-1])
        return replace(base, target_layer_ids=ids, block_size=block)


BASE = "base"

ARMS: dict[str, Arm] = {
    BASE: Arm(),
    "adamw": Arm(optimizer="adamw"),
    "gamma-4": Arm(gamma=4.0),
    "fixed-blocks": Arm(choice="fixed"),
    "layers-3": Arm(layers=3),
    "layers-1": Arm(layers=1),
    "document-answers": Arm(answers="documents"),
    "block-16": Arm(block=16),
    "kd": Arm(loss="kd"),
    "d-pace": Arm(loss="d-pace"),
}
"""By name. The base is the release's way, as far as it is known."""
