"""What each choice in a drafter's training is worth: arms that differ from a base in one of them, at equal cost.

An arm is judged by the accepted length of greedy decoding. The backbone's own greedy answers are at hand, so nothing is
decoded: wherever a block begins, how many of its drafts would stand follows from the answer, and so does where the next
block begins. Rounds are those that decoding has, up to ties nearer than rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.backbone import Backbone
from mimo_jax.config import DrafterConfig
from mimo_jax.drafter import Drafter
from mimo_jax.params import Declared, Params
from mimo_jax.training import TrainingError
from mimo_jax.training.answers import Answers
from mimo_jax.training.arms import Arm
from mimo_jax.training.drafter_training import DrafterTrainer, drafter_step, fill_blocks, read
from mimo_jax.training.initialization import initial_drafter
from mimo_jax.training.optimizers import OptimizerConfig, make_optimizer


@dataclass(frozen=True)
class Budget:
    """What every arm may spend."""

    steps: int
    batch: int
    """Rows a step."""
    length: int
    """Tokens a row."""
    anchors: int
    """Blocks a step of the base; arms with longer blocks have fewer, so that as many rows are drafted."""
    learning_rate: float
    """Peak; the same for Muon and AdamW, whose updates are of one size."""


class ArmTrainer:
    """One arm; programs are compiled once for all seeds."""

    def __init__(self, arm: Arm, backbone: Declared[Backbone], base: DrafterConfig, budget: Budget):
        self.arm, self.budget, self.config = arm, budget, arm.config(base)
        self._drafter = Declared(lambda: Drafter(self.config, "float32"))
        optimizer = OptimizerConfig(arm.optimizer, budget.learning_rate, warmup=budget.steps // 10, final=0.05)
        self._trainer = DrafterTrainer(
            backbone,
            self._drafter,
            make_optimizer(self._drafter.axes, optimizer, budget.steps),
            anchors=max(1, budget.anchors * base.block_size // self.config.block_size),
            choice=arm.choice,
            loss=arm.loss,
            gamma=arm.gamma,
        )

    def train(
        self, frozen: Params, answers: Answers, seed: int, progress: Callable[[int], None] = lambda steps: None
    ) -> tuple[Params, dict[str, float]]:
        """Train from nothing: the drafter, and the last step's metrics.

        Raises:
            TrainingError: The loss is not a finite number.
        """
        budget, key, metrics = self.budget, jax.random.key(seed), {}
        state = self._trainer.start(initial_drafter(self._drafter, frozen["embedding"], seed))
        for step in range(budget.steps):
            batch: Any = answers.batch(step, budget.batch, budget.length, seed)
            state, metrics = drafter_step(self._trainer, state, batch, frozen, jax.random.fold_in(key, step))
            if not np.isfinite(metrics["loss"]):
                raise TrainingError(f"the loss is {metrics['loss']} at step {step + 1}: choose a lower learning rate")
            progress(1)
        return state.params, {name: float(value) for name, value in metrics.items()}

    def stood(self, frozen: Params, params: Params, answers: Answers) -> list[list[int]]:
        """For each answer, how many drafts would stand were a round to begin at each of its tokens."""
        batch, length = self.budget.batch, self.budget.length
        packed = answers.packed(length)
        most = max(sum(answers.size(n, length) for n in numbers) for numbers in packed)
        found: list[list[int]] = [[] for _ in answers.pairs]
        for start in range(0, len(packed), batch):
            numbers = packed[start : start + batch]
            numbers += [[]] * (batch - len(numbers))
            rows = answers.rows(numbers, length)
            anchors = np.zeros((batch, most), np.int32)
            for row, answer in enumerate(rows["answer"]):
                anchors[row, : answer.sum()] = np.flatnonzero(answer)
            counts = np.asarray(_stood(self._trainer, frozen, params, rows, anchors))
            for row, of_row in enumerate(numbers):
                ends = np.cumsum([answers.size(n, length) for n in of_row])
                for number, part in zip(of_row, np.split(counts[row], ends), strict=False):
                    found[number] = part.tolist()
        return found


@partial(jax.jit, static_argnums=0)
def _stood(
    trainer: DrafterTrainer, frozen: Params, params: Params, batch: dict[str, jax.Array], anchors: jax.Array
) -> jax.Array:
    """[batch, blocks] int32: drafts that stand before the first wrong one, in blocks at anchors [batch, blocks]."""
    backbone = trainer.backbone.bind(frozen)
    return fill_blocks(
        trainer, backbone, params, read(trainer, frozen, batch), anchors, jnp.ones(anchors.shape, bool)
    ).stood


def rounds_of(stood: Sequence[int], verify_length: int) -> int:
    """Rounds of greedy decoding of an answer.

    Args:
        stood: How many drafts would stand, were a round to begin at each of its tokens.
        verify_length: Rows that a round verifies, the anchor's included.
    """
    at = rounds = 0
    while at < len(stood) - 1:
        at += min(stood[at], verify_length - 1) + 1
        rounds += 1
    return rounds


def measure(
    trainer: ArmTrainer, frozen: Params, params: Params, held_out: Mapping[str, Answers], verify_length: int
) -> dict[str, Any]:
    """What rounds of greedy decoding give of held-out answers, by the name of the set.

    Returns:
        For each set `tokens`, what rounds emit of each answer, and `rounds`, how many they are, by rows verified: as
        many as asked for, and all of a longer block.
    """
    found = {}
    for name, answers in held_out.items():
        stood = trainer.stood(frozen, params, answers)
        rounds = {n: [rounds_of(s, n) for s in stood] for n in sorted({verify_length, trainer.config.block_size})}
        found[name] = {"tokens": [max(0, len(s) - 1) for s in stood], "rounds": rounds}
    return found
