"""How a hybrid model's layers are cut into loops, so that a program has few bodies to trace and compile."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import batched, takewhile

from mimo_jax.config import LayerKind
from mimo_jax.layers import Layer


@dataclass(frozen=True)
class Run:
    """Consecutive layers of one kind: rows `first` .. `first + count - 1` of the kind's stack."""

    kind: LayerKind
    first: Layer
    first_in_cache: Layer
    """Row of the first layer in the cache of its attention kind."""
    count: int
    captured: bool
    """Whether the residual stream after the last layer is captured."""

    def repeated(self, next_time: "Run", time: Layer) -> "Run":
        """Where the run stands at a time of a loop, of which this is time 0 and the other time 1."""
        return replace(
            self,
            first=self.first + time * (next_time.first - self.first),
            first_in_cache=self.first_in_cache + time * (next_time.first_in_cache - self.first_in_cache),
        )


def runs(layers: tuple[LayerKind, ...], capture: tuple[int, ...]) -> Iterator[Run]:
    """Cut the layers into runs of one kind, ending one after every captured layer."""
    start = 0
    for i, kind in enumerate(layers):
        if i + 1 < len(layers) and layers[i + 1] == kind and i not in capture:
            continue
        before = layers[:start]
        yield Run(
            kind=kind,
            first=before.count(kind),
            first_in_cache=sum(k.attention == kind.attention for k in before),
            count=i + 1 - start,
            captured=i in capture,
        )
        start = i + 1


Stretch = list[tuple[Run, ...]]
"""Runs, or pairs of them, that differ only in where they stand and are captured: times of one loop's body."""


def stretches(layers: tuple[LayerKind, ...], capture: tuple[int, ...]) -> Iterator[Stretch]:
    """Cut the layers into few stretches: of pairs of runs where they repeat, as in hybrid models, else of one run."""
    left = list(runs(layers, capture))
    while left:
        single, pairs = _repeats(left, 1), _repeats(left, 2)
        stretch = pairs if len(pairs) > 1 else single
        yield stretch
        left = left[len(stretch) * len(stretch[0]) :]


def _repeats(left: list[Run], width: int) -> Stretch:
    def shape(time: tuple[Run, ...]) -> list[tuple[LayerKind, int]]:
        return [(run.kind, run.count) for run in time]

    times = list(batched(left, width))
    return list(takewhile(lambda time: shape(time) == shape(times[0]), times))
