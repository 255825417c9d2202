"""A loaded model: configurations, declared modules, parameters on their devices, tokenizer."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding

from mimo_jax.backbone import Backbone
from mimo_jax.cache import backbone_cache, drafter_ring
from mimo_jax.checkpoint import BackboneCheckpoint, DrafterCheckpoint
from mimo_jax.config import BackboneConfig, ConfigError, DrafterConfig, drafter_folder
from mimo_jax.cpu_weights import by_layer
from mimo_jax.drafter import Drafter
from mimo_jax.gpu_weights import can_interleave, interleaved
from mimo_jax.params import Declared, Params
from mimo_jax.placement import check, with_copied_kv_heads
from mimo_jax.progress import reporter
from mimo_jax.speculative import DecodeState, ModelParams, Models, empty_state
from mimo_jax.tokenizer import Tokenizer
from pallas_kernels import backends
from pallas_kernels.interleaved_mxfp4 import WIDTH
from sharding.distributed import agree
from sharding.layout import layout, place
from sharding.topology import Topology

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]
Storage = Literal["packed", "interleaved", "expanded", "by_layer"]

MOST_LAYERS_BY_LAYER = 16
"""A program has the code of every layer of a model that is held by layer."""


@dataclass(frozen=True)
class LoadOptions:
    """What may be chosen when a checkpoint is read. Every default is what the checkpoint and the platform suggest."""

    drafter: Path | Literal["auto", "none"] = "auto"
    """The drafter's folder; auto: `dflash` in the model's folder, where there is one."""
    dtype: Dtype | None = None
    """Of activations, caches and plain weights. Default: float32 on a CPU, bfloat16 elsewhere."""
    storage: Storage | None = None
    """Keep MXFP4 and FP8 weights packed in memory, as stored or interleaved for the kernel (see `gpu_weights`), or
    expand them to `dtype`: in stacks of layers or, on one device, by layer (see `cpu_weights`). Default: on a Hopper
    GPU interleaved if every device's part of an expert allows it; on a CPU that has room for it expanded, where plain
    weights are faster, and by layer if there are few; otherwise packed."""
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

    models: Models
    params: ModelParams
    dtype: Dtype
    tokenizer: Tokenizer | None
    mesh: Mesh = field(default_factory=Topology().mesh)
    """The devices that hold it."""
    _programs: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def config(self) -> BackboneConfig:
        """The backbone's, as devices hold it: KV heads that several share are counted once for each."""
        return self.models.backbone.module.config

    @property
    def drafter_config(self) -> DrafterConfig | None:
        """The drafter's, likewise."""
        return self.models.drafter.module.config if self.models.drafter else None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: the tokenizer's and the configuration's."""
        known = self.tokenizer.eos_ids if self.tokenizer else ()
        return tuple(sorted({*known, *self.config.eos_ids}))

    def placed[T](self, tree: T) -> T:
        """Arguments of programs on the devices: state, requests and the like, as their fields name the axes."""
        return place(tree, layout(tree, self.models.topology), self.mesh)

    def empty_state(self, batch: int, capacity: int) -> DecodeState:
        """The state of a batch before any token, on the devices; `batch` is a multiple of the data-parallel groups."""
        key = ("empty_state", batch, capacity)
        if key not in self._programs:
            self._programs[key] = self._maker(partial(self._build_state, batch, capacity))
        return self._programs[key]()

    def made[T](self, build: Callable[[], T]) -> T:
        """What `build` gives, each device making its own part (see `placed`)."""
        return self._maker(build)()

    def _maker[T](self, build: Callable[[], T]) -> Callable[[], T]:
        shapes = self.shaped(jax.eval_shape(build))
        return jax.jit(build, out_shardings=jax.tree.map(lambda s: s.sharding, shapes))

    def state_shapes(self, batch: int, capacity: int) -> DecodeState:
        """Shapes, dtypes and places of `empty_state`."""
        return self.shaped(jax.eval_shape(partial(self._build_state, batch, capacity)))

    def shaped[T](self, tree: T) -> T:
        """Shapes, dtypes and places of arguments of programs (see `placed`)."""

        def shape(x: Any, spec: jax.P) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec))

        return jax.tree.map(shape, tree, layout(tree, self.models.topology))

    def _build_state(self, batch: int, capacity: int) -> DecodeState:
        config, drafter, groups = self.config, self.drafter_config, self.models.topology.data_parallel
        block = drafter.block_size if drafter else 1
        cache = backbone_cache(config, batch, capacity, block, self.dtype, groups=groups)
        ring = drafter_ring(drafter, batch, capacity, self.dtype) if drafter else None
        return empty_state(cache, ring, config.vocab_size)

    def compiled(self, program: Callable, arguments: tuple, statics: dict[str, Any]) -> Callable:
        """`program(models, params, *arguments, **statics)` for all devices, compiled once for each set of shapes.

        A program is written for one device. It gives its state, and something that is the same on every device.

        Args:
            program: Jitted; `models` and all of `statics` are static.
            arguments: The state, which is donated, and what else it takes, placed or as shapes and dtypes.
            statics: Plain values.

        Returns:
            A function of (params, *arguments).
        """
        leaves, structure = jax.tree.flatten(arguments)
        avals = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        key = (program, structure, avals, tuple(sorted(statics.items())))
        if key not in self._programs:
            self._programs[key] = self.lowered(program, arguments, statics).compile()
        return self._programs[key]

    def lowered(self, program: Callable, arguments: tuple, statics: dict[str, Any]) -> jax.stages.Lowered:
        """What `compiled` compiles."""
        given = (self.params, *arguments)
        specs = layout(given[0], self.models.topology), *(layout(a, self.models.topology) for a in arguments)
        on_all = jax.shard_map(
            partial(program.__wrapped__, self.models, **statics),
            mesh=self.mesh,
            in_specs=specs,
            out_specs=(specs[1], jax.P()),
            check_vma=False,
        )
        return jax.jit(on_all, donate_argnums=1).lower(*given)


def load_model(
    folder: Path, options: LoadOptions = LoadOptions(), progress: Callable[[str, int, int], None] | None = None
) -> Model:
    """Read a checkpoint folder in Hugging Face layout.

    Everything that can be wrong with configurations, names, shapes and dtypes is found before any weight is read.

    Args:
        folder: `config.json`, safetensors, perhaps a tokenizer, perhaps `dflash/`.
        options: Choices.
        progress: Called with (component, bytes read so far, bytes that this process reads in all).

    Raises:
        ConfigError, CheckpointError, TokenizerError: With the file and key, tensor or token that is wrong.
        TopologyError: The model cannot be cut that way, or there are too few devices.
        SnapshotError: The snapshot is of something else, unfinished or damaged.
    """
    config = BackboneConfig.from_folder(
        folder, swa_visible_keys=options.swa_visible_keys, router_dtype=options.router_dtype
    )
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    checkpoint = BackboneCheckpoint(folder, config, options.qkv_layout)
    drafter_at = find_drafter(folder, options.drafter)
    drafter_config = drafter_checkpoint = None
    if drafter_at is not None:
        drafter_config = DrafterConfig.from_folder(drafter_at, rope_theta=options.draft_rope_theta)
        drafter_config.check_fits(config)
        drafter_checkpoint = DrafterCheckpoint(drafter_at, drafter_config)
    topology = options.topology
    check(topology, config, drafter_config)
    mesh = topology.mesh()
    models = declare_models(config, drafter_config, dtype, topology)
    tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
    storage = options.storage or default_storage(models)
    if storage == "by_layer" and topology.tensor_parallel > 1:
        raise ValueError(
            f"storage by_layer is for one device, not {topology.tensor_parallel}: choose expanded or packed"
        )
    if storage == "interleaved" and not can_interleave(config, topology):
        raise ValueError(
            f"storage interleaved needs a hidden size in 256s and on every device a part of an expert's "
            f"{config.moe.intermediate} columns in {WIDTH}s, not {config.hidden_size} and "
            f"1/{topology.width('expert_inner')}: choose packed"
        )

    # processes that ran different programs would wait for each other forever
    alike = replace(options, drafter="auto", snapshot=None)
    said = (config, drafter_config, dtype, storage, alike, options.snapshot is None)
    agree({"models or options": said})

    def placed(axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
        return topology.sharding(mesh, axes, shape)

    read_as = "packed" if storage in ("packed", "interleaved") else "expanded"

    def read(component: str, source: BackboneCheckpoint | DrafterCheckpoint, declared: Declared) -> Params:
        report = reporter(progress, component, source.read_bytes(declared, read_as, placed))
        return source.load(declared, storage=read_as, sharding=placed, progress=report)

    def load() -> ModelParams:
        return ModelParams(
            read("backbone", checkpoint, models.backbone),
            read("drafter", drafter_checkpoint, models.drafter) if drafter_checkpoint and models.drafter else None,
        )

    if options.snapshot is None:
        params = load()
    else:
        from mimo_jax.snapshot import restore_or_load  # Orbax takes a while to import

        outline = ModelParams(
            checkpoint.outline(models.backbone, read_as, placed),
            drafter_checkpoint.outline(models.drafter, read_as, placed)
            if drafter_checkpoint and models.drafter
            else None,
        )
        sources = {"backbone": checkpoint, "drafter": drafter_checkpoint}
        made_with = {"storage": read_as, "dtype": dtype, "qkv_layout": options.qkv_layout}
        params = restore_or_load(options.snapshot, sources, made_with, outline, load)
    if storage == "by_layer":
        drafter_params = by_layer(params.drafter, models.drafter.axes) if params.drafter and models.drafter else None
        params = ModelParams(by_layer(params.backbone, models.backbone.axes), drafter_params)
    if storage == "interleaved":
        backbone = interleaved(params.backbone, models.backbone.axes, topology, mesh)
        params = replace(params, backbone=backbone)
    return Model(models, params, dtype, tokenizer, mesh)


def declare_models(
    config: BackboneConfig, drafter: DrafterConfig | None, dtype: Dtype, topology: Topology = Topology()
) -> Models:
    """Backbone and drafter as devices of a topology hold them, waiting for parameters."""
    held = with_copied_kv_heads(config, topology)
    backbone = Declared(lambda: Backbone(held, dtype, topology))
    if drafter is None:
        return Models(backbone)
    held_drafter = with_copied_kv_heads(drafter, topology)
    return Models(backbone, Declared(lambda: Drafter(held_drafter, dtype, topology)))


def default_storage(models: Models) -> Storage:
    """On a Hopper GPU interleaved if it can be; on a CPU with room for two copies of the plain weights expanded, by
    layer where it can be; otherwise packed.
    """
    backbone = models.backbone
    if jax.default_backend() != "cpu":
        config = backbone.module.config
        quantized = config.quantization is not None and config.quantization.expert_format == "mxfp4"
        hopper = backends.on_gpus() == "mosaic_gpu"
        return "interleaved" if hopper and quantized and can_interleave(config, models.topology) else "packed"
    expanded = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backbone.shapes))
    if 2 * expanded >= available_memory():
        return "packed"
    few = len(backbone.module.config.layers) <= MOST_LAYERS_BY_LAYER
    return "by_layer" if few and models.topology.tensor_parallel == 1 else "expanded"


def available_memory() -> int:
    """Bytes of host memory that can be had without swapping; without /proc, a modest guess of 8 GiB."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 8 << 30
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


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
