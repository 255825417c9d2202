"""A loaded model: configurations, declared modules, parameters on their devices, tokenizer."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax

from mimo_jax.backbone import Backbone
from mimo_jax.checkpoint import BackboneCheckpoint, DrafterCheckpoint
from mimo_jax.config import BackboneConfig, ConfigError, DrafterConfig, drafter_folder
from mimo_jax.drafter import Drafter
from mimo_jax.params import Declared, Params
from mimo_jax.placement import check
from mimo_jax.snapshot import restore_or_load
from mimo_jax.speculative import ModelParams, Models
from mimo_jax.tokenizer import Tokenizer
from sharding.topology import Topology

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]
Storage = Literal["packed", "expanded"]


@dataclass(frozen=True)
class LoadOptions:
    """What may be chosen when a checkpoint is read. Every default is what the checkpoint and the platform suggest."""

    drafter: Path | Literal["auto", "none"] = "auto"
    """The drafter's folder; auto: `dflash` in the model's folder, where there is one."""
    dtype: Dtype | None = None
    """Of activations, caches and plain weights. Default: float32 on a CPU, bfloat16 elsewhere."""
    storage: Storage | None = None
    """Keep MXFP4 and FP8 weights packed in memory, or expand them to `dtype`. Default: packed, but expanded on a CPU
    that has room for it, where plain weights are faster."""
    swa_visible_keys: int | None = None
    """Keys an SWA query sees (see `BackboneConfig.from_hf`)."""
    router_dtype: Dtype | None = None
    """Precision of the router's inputs (see `BackboneConfig.from_hf`)."""
    qkv_layout: Literal["auto", "chunked", "canonical"] = "auto"
    """Row order of a fused qkv weight, where the checkpoint does not prove it."""
    draft_rope_theta: float | None = None
    """Replaces the drafter's RoPE base."""
    topology: Topology = field(default_factory=Topology)
    """How weights lie on devices; everything computed from them follows."""
    snapshot: Path | None = None
    """Folder of weights as they lie in memory: restored from, or made after loading if there is none."""


@dataclass(frozen=True, eq=False)
class Model:
    """A backbone, perhaps its drafter, and what turns text into ids."""

    config: BackboneConfig
    drafter_config: DrafterConfig | None
    dtype: Dtype
    models: Models
    params: ModelParams
    tokenizer: Tokenizer | None
    _programs: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: the tokenizer's and the configuration's."""
        known = self.tokenizer.eos_ids if self.tokenizer else ()
        return tuple(sorted({*known, *self.config.eos_ids}))

    def compiled(self, program: Callable, arguments: tuple, statics: dict[str, Any]) -> Callable:
        """`program(models, params, *arguments, **statics)` compiled, once for each set of shapes and statics.

        Returns:
            A function of (params, *arguments).
        """
        leaves, structure = jax.tree.flatten(arguments)
        avals = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        key = (program, structure, avals, tuple(sorted(statics.items())))
        if key not in self._programs:
            lowered = program.lower(self.models, self.params, *arguments, **statics)
            self._programs[key] = lowered.compile()
        return self._programs[key]


def load_model(
    folder: Path, options: LoadOptions = LoadOptions(), progress: Callable[[str, int, int], None] | None = None
) -> Model:
    """Read a checkpoint folder in Hugging Face layout.

    Everything that can be wrong with configurations, names, shapes and dtypes is found before any weight is read.

    Args:
        folder: `config.json`, safetensors, perhaps a tokenizer, perhaps `dflash/`.
        options: Choices.
        progress: Called with (component, bytes read so far, bytes in all).

    Raises:
        ConfigError, CheckpointError, TokenizerError: With the file and key, tensor or token that is wrong.
        TopologyError: The model cannot be cut that way, or there are too few devices.
        SnapshotError: The snapshot is of something else, unfinished or damaged.
    """
    config = BackboneConfig.from_folder(
        folder, swa_visible_keys=options.swa_visible_keys, router_dtype=options.router_dtype
    )
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    backbone = Declared(lambda: Backbone(config, dtype))
    checkpoint = BackboneCheckpoint(folder, config, options.qkv_layout)
    drafter_at = find_drafter(folder, options.drafter)
    drafter = drafter_config = drafter_checkpoint = None
    if drafter_at is not None:
        drafter_config = DrafterConfig.from_folder(drafter_at, rope_theta=options.draft_rope_theta)
        drafter_config.check_fits(config)
        drafter = _declare_drafter(drafter_config, dtype)
        drafter_checkpoint = DrafterCheckpoint(drafter_at, drafter_config)
    check(options.topology, config, drafter_config)
    mesh = options.topology.mesh()
    tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
    storage = options.storage or default_storage(backbone.shapes)

    def placed(axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
        return options.topology.sharding(mesh, axes, shape)

    def read(component: str, source: BackboneCheckpoint | DrafterCheckpoint, declared: Declared) -> Params:
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(component, done, source.total_bytes)

        return source.load(declared, storage=storage, sharding=placed, progress=report)

    def load() -> ModelParams:
        return ModelParams(
            read("backbone", checkpoint, backbone),
            read("drafter", drafter_checkpoint, drafter) if drafter_checkpoint and drafter else None,
        )

    if options.snapshot is None:
        params = load()
    else:
        outline = ModelParams(
            checkpoint.outline(backbone, storage, placed),
            drafter_checkpoint.outline(drafter, storage, placed) if drafter_checkpoint and drafter else None,
        )
        sources = {"backbone": checkpoint, "drafter": drafter_checkpoint}
        made_with = {"storage": storage, "dtype": dtype, "qkv_layout": options.qkv_layout}
        params = restore_or_load(options.snapshot, sources, made_with, outline, load)
    return Model(config, drafter_config, dtype, Models(backbone, drafter), params, tokenizer)


def default_storage(shapes: Any) -> Storage:
    """Expanded on a CPU with room for two copies of the plain weights, packed otherwise."""
    if jax.default_backend() != "cpu":
        return "packed"
    expanded = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return "expanded" if 2 * expanded < available_memory() else "packed"


def available_memory() -> int:
    """Bytes of host memory that can be had without swapping; without /proc, a modest guess of 8 GiB."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 8 << 30
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def _declare_drafter(config: DrafterConfig, dtype: Dtype) -> Declared[Drafter]:
    return Declared(lambda: Drafter(config, dtype))


def find_drafter(folder: Path, choice: Path | str) -> Path | None:
    """Where the drafter of a checkpoint lies by `LoadOptions.drafter`, if there is to be one.

    Raises:
        ConfigError: There is no such folder.
    """
    if choice == "none":
        return None
    if choice == "auto":
        return drafter_folder(folder)
    chosen = Path(choice)
    if not chosen.is_dir():
        raise ConfigError(f"{chosen}: no such drafter folder")
    return chosen
