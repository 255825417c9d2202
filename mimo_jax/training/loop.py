"""The training loop: steps with checkpoints, metrics and a picture, that may be killed anywhere and go on as it was.

A batch is a function of its step's number and a step of the state before it, so a run that goes on from a checkpoint
repeats what it would have done.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mimo_jax.progress import drawing, require_matplotlib
from mimo_jax.training import TrainingError

Metrics = dict[str, jax.Array]


class Run:
    """A folder that holds a training run: its settings, checkpoints, metrics and picture.

    Args:
        folder: Made if it does not exist.
        settings: What defines the run, as plain values. A folder of a run with other settings is refused.

    Raises:
        TrainingError: The folder holds something else.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        path = folder / "run.json"
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(k for k in {*earlier, *settings} if earlier.get(k) != settings.get(k))
            if differing:
                k = differing[0]
                raise TrainingError(
                    f"{folder}: holds a run with other settings: {k} was {earlier.get(k)!r} and is "
                    f"{settings.get(k)!r}; go on with the same settings, or choose another folder"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise TrainingError(f"{folder}: is not empty and no training run; choose another folder")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        self._metrics = folder / "metrics.jsonl"

    @staticmethod
    def settings_of(folder: Path) -> dict[str, Any]:
        """What a run was defined by; raises `TrainingError` if the folder holds none."""
        path = folder / "run.json"
        if not path.is_file():
            raise TrainingError(f"{folder}: holds no training run: there is no run.json")
        return json.loads(path.read_text(encoding="utf-8"))

    @staticmethod
    def latest_params(folder: Path, like: Any) -> Any | None:
        """The parameters in the latest checkpoint of a run, with the shapes of `like`; None if there is none."""
        checkpoints = (folder / "checkpoints").absolute()
        if not checkpoints.is_dir():
            return None
        with ocp.CheckpointManager(checkpoints) as manager:
            step = manager.latest_step()
            if step is None:
                return None
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
            restore = ocp.checkpoint_utils.construct_restore_args({"params": shapes})
            wanted = ocp.args.PyTreeRestore({"params": shapes}, restore_args=restore, partial_restore=True)
            return manager.restore(step, args=wanted)["params"]

    @contextmanager
    def _checkpoints(self) -> Iterator[ocp.CheckpointManager]:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        with ocp.CheckpointManager((self.folder / "checkpoints").absolute(), options=options) as manager:
            yield manager

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """The latest checkpoint as (steps done, state), with shapes and placements of `like`; None if there is none."""
        with self._checkpoints() as manager:
            step = manager.latest_step()
            if step is None:
                return None
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
            return step, manager.restore(step, args=ocp.args.StandardRestore(shapes))

    def train(
        self,
        state: Any,
        step: Callable[[Any, Any], tuple[Any, Metrics]],
        batch: Callable[[int], Any],
        *,
        steps: int,
        checkpoint_every: int,
        tokens_per_step: int,
        title: str,
    ) -> Any:
        """Run steps up to `steps`, from the latest checkpoint if there is one.

        Args:
            state: Before the first step; donated.
            step: (state, batch) to (state, scalar metrics, among them `loss`); compiled by the caller.
            batch: The batch of a step's number.
            steps: In all.
            checkpoint_every: Steps between checkpoints; one is written at the end in any case.
            tokens_per_step: For the speed shown.
            title: Of progress bar and picture.

        Raises:
            TrainingError: The loss is not a finite number. The checkpoint before stands.
        """
        require_matplotlib()
        done = 0
        if (restored := self.restore(state)) is not None:
            done, state = restored
        history = self._history(done)
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeElapsedColumn())
        with (
            self._checkpoints() as manager,
            self._metrics.open("a", encoding="utf-8") as log,
            Progress(TextColumn(title), *columns, TimeRemainingColumn(), console=console) as bars,
        ):
            bar = bars.add_task(title, total=steps, completed=done, figures="")
            saved = done
            try:
                for number in range(done, steps):
                    begin = time.perf_counter()
                    new, metrics = step(state, batch(number))
                    values = {k: float(v) for k, v in metrics.items()}
                    seconds = time.perf_counter() - begin
                    if not math.isfinite(values["loss"]):
                        raise TrainingError(
                            f"the loss is {values['loss']} at step {number + 1}; training stops. The last good "
                            f"checkpoint, of step {saved}, is in {self.folder / 'checkpoints'}"
                            if saved
                            else f"the loss is {values['loss']} at step {number + 1}, before the first checkpoint"
                        )
                    state, done = new, number + 1
                    line = {"step": done, **values, "seconds": round(seconds, 4)}
                    history.append(line)
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    speed = tokens_per_step / seconds
                    bars.update(bar, advance=1, figures=f"loss {values['loss']:.3f}  {speed:,.0f} tokens/s")
                    if done % checkpoint_every == 0 or done == steps:
                        manager.save(done, args=ocp.args.StandardSave(state))
                        saved = done
                        plot(history, self.folder / "metrics.png", title)
            except KeyboardInterrupt:
                if done > saved:
                    manager.save(done, args=ocp.args.StandardSave(state))
                raise
        return state

    def _history(self, done: int) -> list[dict[str, float]]:
        """Metrics of the steps that the checkpoint holds; later ones, of steps to be repeated, are dropped."""
        if not self._metrics.is_file():
            return []
        lines = [json.loads(line) for line in self._metrics.read_text(encoding="utf-8").splitlines() if _whole(line)]
        kept = [line for line in lines if line["step"] <= done]
        self._metrics.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        return kept


def _whole(line: str) -> bool:
    """Whether a line was written to its end before the process was killed."""
    return line.startswith("{") and line.endswith("}")


def plot(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Draw every metric over the steps."""
    names = [k for k in history[-1] if k not in ("step", "seconds")]
    with drawing(path, rows=len(names)) as axes:
        for axis, name in zip(axes, names, strict=True):
            axis.plot([h["step"] for h in history], [h[name] for h in history], linewidth=0.8)
            axis.set_ylabel(name)
        axes[0].set_title(title)
        axes[-1].set_xlabel("step")
