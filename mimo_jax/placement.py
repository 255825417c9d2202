"""What each device holds of a model under a topology, and whether the model can be cut that way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table

from mimo_jax.config import AttentionConfig, BackboneConfig, DrafterConfig
from pallas_kernels.fp8 import COLUMNS as FP8_COLUMNS
from pallas_kernels.mxfp4 import BLOCK
from sharding.topology import Topology, TopologyError


@dataclass(frozen=True)
class Holding:
    """What one device has: half-open ranges of the whole."""

    device: int
    data: int
    """Its row of the mesh: the data-parallel group whose sequences it attends to."""
    tensor: int
    """Its column of the mesh."""
    heads: tuple[int, int]
    """Query heads, of every layer."""
    kv_heads: dict[str, tuple[int, int]]
    """Key-value heads, by kind of layer."""
    experts: tuple[int, int]
    expert_columns: tuple[int, int]
    """Of each of its experts' inner size."""
    vocabulary: tuple[int, int]
    dense_columns: tuple[int, int]
    """Of dense MLPs' inner size."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return vars(self)


def check(topology: Topology, config: BackboneConfig, drafter: DrafterConfig | None = None) -> None:
    """Raise if a model cannot be cut this way.

    Raises:
        TopologyError: With the numbers that do not divide.
    """
    attentions = _attentions(config) | ({"drafter": drafter.attention} if drafter else {})
    for name, attention in attentions.items():
        width, kv_heads = topology.width("heads"), attention.kv_heads
        _divides(attention.heads, width, f"{attention.heads} heads of {name} attention")
        if kv_heads % width and width % kv_heads:
            raise TopologyError(
                f"{kv_heads} KV heads of {name} attention neither divide by {width} devices nor does their "
                f"number divide them, so that each could be copied to equally many"
            )
    _divides(config.vocab_size, topology.width("vocab"), f"a vocabulary of {config.vocab_size}")
    _divides(config.moe.experts, topology.width("expert"), f"{config.moe.experts} experts")
    quantized = config.quantization
    block = 1 if quantized is None else BLOCK if quantized.expert_format == "mxfp4" else FP8_COLUMNS
    slices = topology.width("expert_inner")
    _divides(config.moe.intermediate, slices, f"an expert's inner size of {config.moe.intermediate}", block)
    width = topology.width("mlp")
    block = 1 if quantized is None else FP8_COLUMNS
    cure = "; --moe-dense-tp-size 1 keeps dense MLPs whole"
    _divides(config.dense_intermediate, width, f"a dense inner size of {config.dense_intermediate}", block, cure)
    if drafter is not None:
        width = topology.width("draft_mlp")
        _divides(drafter.intermediate, width, f"the drafter's inner size of {drafter.intermediate}")


def with_copied_kv_heads[C: (BackboneConfig, DrafterConfig)](config: C, topology: Topology) -> C:
    """The configuration of what devices hold: where more of them share a KV head's query heads, each has a copy.

    With each KV head repeated, groups of query heads are as many times smaller, and attention is the same.
    """
    width = topology.width("heads")
    names = ("full", "swa") if isinstance(config, BackboneConfig) else ("attention",)
    attentions = {name: getattr(config, name) for name in names}
    return replace(config, **{n: replace(a, kv_heads=max(a.kv_heads, width)) for n, a in attentions.items()})


def holdings(topology: Topology, config: BackboneConfig, drafter: DrafterConfig | None = None) -> list[Holding]:
    """What every device holds, in the order of the devices.

    Raises:
        TopologyError: As `check`.
    """
    check(topology, config, drafter)
    found = []
    for data, tensor in product(range(topology.data_parallel), range(topology.attention_tensor)):
        part = partial(topology.part, data=data, tensor=tensor)
        found.append(
            Holding(
                device=len(found),
                data=data,
                tensor=tensor,
                heads=part("heads", config.full.heads),
                kv_heads={name: _kv_heads(part("heads", a.heads), a) for name, a in _attentions(config).items()},
                experts=part("expert", config.moe.experts),
                expert_columns=part("expert_inner", config.moe.intermediate),
                vocabulary=part("vocab", config.vocab_size),
                dense_columns=part("mlp", config.dense_intermediate),
            )
        )
    return found


def draw(topology: Topology, found: Sequence[Holding], console: Console) -> None:
    """Print what every device holds, for people."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in topology.axes.items())
    groups = "; devices of one data group attend to the same sequences" if topology.data_parallel > 1 else ""
    console.print(f"{topology.tensor_parallel} devices, mesh {mesh}{groups}", highlight=False)
    kinds = list(found[0].kv_heads)
    names = ("device", "data", "tensor", "heads", *(f"KV {kind}" for kind in kinds), "experts", "their columns")
    table = Table(show_edge=False)
    for name in (*names, "vocabulary", "dense columns"):
        table.add_column(name, no_wrap=True)
    for one in found:
        parts = (one.heads, *(one.kv_heads[kind] for kind in kinds))
        parts += (one.experts, one.expert_columns, one.vocabulary, one.dense_columns)
        table.add_row(f"{one.device}", f"{one.data}", f"{one.tensor}", *map(_range, parts))
    console.print(table)


def _range(part: tuple[int, int]) -> str:
    first, end = part
    return f"{first}" if end == first + 1 else f"{first}-{end - 1}"


def _attentions(config: BackboneConfig) -> dict[str, AttentionConfig]:
    """The kinds of attention that a model has."""
    kinds = {layer.attention for layer in config.layers}
    return {name: a for name, a in (("full", config.full), ("swa", config.swa)) if name in kinds}


def _kv_heads(heads: tuple[int, int], attention: AttentionConfig) -> tuple[int, int]:
    """Key-value heads that a range of query heads reads."""
    group = attention.heads // attention.kv_heads
    return heads[0] // group, -(-heads[1] // group)


def _divides(whole: int, width: int, name: str, block: int = 1, cure: str = "") -> None:
    """Raise unless `whole` falls into `width` parts of whole blocks; one part may end in a part of a block."""
    if width > 1 and whole % (width * block):
        blocks = f" of whole blocks of {block}" if block > 1 else ""
        raise TopologyError(f"{name} cannot be cut into {width} equal parts{blocks}{cure}")
