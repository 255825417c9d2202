"""What the steps of `mimo-jax train` do, one function each, given parsed arguments."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mimo_jax import placement
from mimo_jax.arguments import topology_of
from mimo_jax.backbone import Backbone
from mimo_jax.byte_tokenizer import write_byte_tokenizer
from mimo_jax.commands import planned_topology
from mimo_jax.config import BackboneConfig, DrafterConfig
from mimo_jax.devices import known_devices, parse_devices
from mimo_jax.drafter import Drafter
from mimo_jax.generate import Generator
from mimo_jax.params import Declared, Params
from mimo_jax.presets import PRESETS
from mimo_jax.progress import counting_bar, output_console
from mimo_jax.request import SamplingParams
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training import TrainingError, step_report
from mimo_jax.training.answers import Answers
from mimo_jax.training.backbone_training import BackboneTrainer, backbone_step
from mimo_jax.training.corpus.mixture import documents
from mimo_jax.training.drafter_training import DrafterTrainer, drafter_step
from mimo_jax.training.fake_quantization import as_stored
from mimo_jax.training.groups import Groups
from mimo_jax.training.induction import with_induction
from mimo_jax.training.initialization import initial_drafter, initial_params
from mimo_jax.training.local_shard import skipped
from mimo_jax.training.loop import Run
from mimo_jax.training.optimizers import OptimizerConfig, TrainState, make_optimizer
from mimo_jax.training.prompts import asked, asked_late
from mimo_jax.training.regeneration import regenerate
from mimo_jax.training.release import write_drafter, write_plain, write_release
from mimo_jax.training.step_plan import StepPlan
from mimo_jax.training.tokens import Conversation, Tokens, tokenize

_LEARNT_FROM = 4000  # documents that a tokenizer learns its merges from


def train_corpus(arguments: argparse.Namespace) -> None:
    """`mimo-jax train corpus`."""
    out: Path = arguments.out
    if out.exists() and any(out.iterdir()):
        raise TrainingError(f"{out}: is not empty; choose another folder")
    texts = [path.read_text(encoding="utf-8") for path in arguments.text]
    for path, text in zip(arguments.text, texts, strict=True):
        if not text.strip():
            raise TrainingError(f"{path}: holds no text")
    count = len(texts) or arguments.documents

    def made() -> Iterator[str | Conversation]:
        generated = (d.messages if d.text is None else d.text for d in documents(seed=arguments.seed))
        return islice(iter(texts) if texts else generated, count)

    write_byte_tokenizer(out, arguments.vocab_size, map(_plain_text, islice(made(), _LEARNT_FROM)))
    with counting_bar("documents", count) as advance:
        tokens = tokenize(made(), Tokenizer.from_folder(out), progress=lambda: advance(1))
    tokens.write(out / "train.safetensors")
    sources = [str(path) for path in arguments.text] or ["generated"]
    about = {"documents": count, "sources": sources, "seed": arguments.seed, "tokens": tokens.ids.size}
    (out / "corpus.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out}: {count:,} documents, {tokens.ids.size:,} tokens", file=sys.stderr)


def train_backbone(arguments: argparse.Namespace) -> None:
    """`mimo-jax train backbone`."""
    hf = PRESETS[arguments.preset].backbone
    config = BackboneConfig.from_hf(hf)
    tokens = Tokens.read(arguments.corpus / "train.safetensors", config.vocab_size)
    optimizer = _optimizer(arguments)
    groups = _groups(arguments)
    placement.check(groups.topology, config)
    groups.check(arguments.batch, arguments.length)
    groups.check_heads(*map(config.attention, config.attention_kinds))
    backbone = Declared(lambda: Backbone(config, "float32", groups.topology))
    check_length(arguments.length, config)
    tokens.batch(0, arguments.batch, arguments.length + 1, arguments.seed)  # raises if the text is shorter than a row
    optimizing = make_optimizer(backbone.axes, optimizer, arguments.steps)
    trainer = BackboneTrainer(backbone, optimizing, arguments.qat, groups)
    settings = {"qat": arguments.qat, "start_from": _named(arguments.start_from)}
    run = Run(arguments.out, settings | _settings(arguments, optimizer, tokens))
    params = with_induction(initial_params(backbone, len(config.layers), arguments.seed), config, arguments.seed)
    if arguments.start_from is not None:
        earlier = Run.settings_of(arguments.start_from)["preset"]
        if earlier != arguments.preset:
            raise TrainingError(f"{arguments.start_from}: trained the preset {earlier}, not {arguments.preset}")
        params = _trained(arguments.start_from, params)

    def batch(step: int) -> dict[str, Any]:
        return tokens.batch(step, arguments.batch, arguments.length + 1, arguments.seed)

    run.train(
        trainer.start(params),
        lambda state, given: backbone_step(trainer, state, given),
        batch,
        steps=arguments.steps,
        checkpoint_every=arguments.checkpoint_every,
        tokens_per_step=arguments.batch * arguments.length,
        title=f"backbone {arguments.preset}",
    )
    print(f"trained {arguments.out}", file=sys.stderr)


def train_regenerate(arguments: argparse.Namespace) -> None:
    """`mimo-jax train regenerate`."""
    generator = Generator.load(arguments.model, drafter="none")
    if arguments.context:
        given = asked_late(generator.tokenizer, arguments.seed, arguments.context)
    else:
        given = (prompt for prompt, _ in asked(generator.tokenizer, arguments.seed, arguments.reworded))
    prompts = list(islice(given, arguments.prompts))
    params = SamplingParams(arguments.max_new_tokens, arguments.temperature, top_p=arguments.top_p, seed=arguments.seed)
    with counting_bar("answers", arguments.prompts) as advance:
        regenerate(generator, prompts, params, arguments.out, batch=arguments.batch, progress=advance)
    print(f"wrote {arguments.out}: {len(prompts):,} answers", file=sys.stderr)


def train_drafter(arguments: argparse.Namespace) -> None:
    """`mimo-jax train drafter`."""
    hf = PRESETS[arguments.preset].drafter
    if hf is None:
        raise TrainingError(f"the preset {arguments.preset} has no drafter")
    config = DrafterConfig.from_hf(hf)
    groups = _groups(arguments)
    groups.check_heads(config.attention)
    groups.check(arguments.batch, arguments.length)
    skipped(config, groups, arguments.edges)  # raises if they cannot be
    start_from: Path | None = arguments.start_from
    options: dict[str, Any] = {"drafter": start_from or "none", "topology": groups.topology}
    if jax.default_backend() == "cpu":  # elsewhere packed and in bfloat16, as it is served
        options |= {"storage": "expanded", "dtype": "float32"}
    model = Generator.load(arguments.model, **options).model
    config.check_fits(model.config)
    if start_from is not None and model.drafter_config != config:
        raise TrainingError(f"{start_from}: this drafter has another shape than that of the preset {arguments.preset}")
    placement.check(groups.topology, model.config, config)
    answers = Answers.read(arguments.answers, model.config.vocab_size)
    check_length(arguments.length, model.config)
    optimizer = _optimizer(arguments)
    drafter = Declared(lambda: Drafter(config, model.dtype, groups.topology))
    trainer = DrafterTrainer(
        model.models.backbone,
        drafter,
        make_optimizer(drafter.axes, optimizer, arguments.steps),
        anchors=arguments.anchors,
        loss=arguments.loss,
        gamma=arguments.gamma,
        groups=groups,
        edges=arguments.edges,
    )
    settings = {"model": _named(arguments.model), "start_from": _named(start_from)}
    settings |= {name: getattr(arguments, name) for name in ("anchors", "loss", "gamma", "cut_sequences")}
    run = Run(arguments.out, settings | _settings(arguments, optimizer, answers))
    if model.params.drafter is None:
        params = initial_drafter(drafter, model.params.backbone["embedding"], arguments.seed)
    else:
        params = jax.tree.map(lambda x: x.astype(jnp.float32), model.params.drafter)
    key = jax.random.key(arguments.seed)

    def batch(step: int) -> dict[str, Any]:
        given = answers.batch(step, arguments.batch, arguments.length, arguments.seed, alone=arguments.cut_sequences)
        return given | {"step": step}

    def step(state: TrainState, given: dict[str, Any]) -> tuple[TrainState, dict[str, jax.Array]]:
        number = given.pop("step")
        return drafter_step(trainer, state, given, model.params.backbone, jax.random.fold_in(key, number))

    run.train(
        trainer.start(params),
        step,
        batch,
        steps=arguments.steps,
        checkpoint_every=arguments.checkpoint_every,
        tokens_per_step=arguments.batch * arguments.length,
        title=f"drafter {arguments.preset}",
    )
    print(f"trained {arguments.out}", file=sys.stderr)


def train_plan(arguments: argparse.Namespace) -> None:
    """`mimo-jax train plan`."""
    config, drafter = PRESETS[arguments.preset].configs()
    if drafter is None:
        raise TrainingError(f"the preset {arguments.preset} has no drafter")
    count, device = parse_devices(arguments.devices, known_devices(arguments.device_file))
    topology, _ = planned_topology(arguments, count)
    load = arguments.batch, arguments.length, arguments.anchors
    plan = StepPlan(config, drafter, topology, device, *load, not arguments.whole_sequences, arguments.edges)
    described = step_report.describe(plan)
    if arguments.compile:
        described["compiled"] = step_report.compiled(arguments.preset, plan)
    if arguments.json:
        print(json.dumps(described))
    else:
        step_report.report(described, output_console(), step_report.heading(arguments.preset, plan))
    if not described["fits"]:
        raise TrainingError(
            f"does not fit: each of {count} x {device.name} would need {plan.used:,} bytes and has "
            f"{int(device.memory_bytes):,}; what helps: more devices, or fewer positions a step"
        )


def train_export(arguments: argparse.Namespace) -> None:
    """`mimo-jax train export`."""
    settings = Run.settings_of(arguments.run)
    if "preset" not in settings:
        raise TrainingError(f"{arguments.run}: is an ablation, which keeps no parameters")
    preset = PRESETS[settings["preset"]]
    if "anchors" in settings:
        assert preset.drafter is not None
        config = DrafterConfig.from_hf(preset.drafter)
        drafter = Declared(lambda: Drafter(config, "float32"))
        params = _trained(arguments.run, drafter.shapes)
        write_drafter(arguments.out, preset.drafter, params, overwrite=arguments.overwrite)
    else:
        if arguments.corpus is None:
            raise TrainingError("a backbone needs --corpus DIR, whose tokenizer goes with it")
        backbone_config = BackboneConfig.from_hf(preset.backbone)
        backbone = Declared(lambda: Backbone(backbone_config, "float32"))
        params = _trained(arguments.run, backbone.shapes)
        if settings["qat"]:
            params = jax.jit(lambda p: as_stored(p, backbone.axes))(params)
        write = write_plain if arguments.plain else write_release
        write(arguments.out, preset.backbone, params, arguments.corpus, overwrite=arguments.overwrite)
    print(f"wrote {arguments.out}", file=sys.stderr)


def _optimizer(arguments: argparse.Namespace) -> OptimizerConfig:
    return OptimizerConfig(
        arguments.optimizer, arguments.learning_rate, arguments.warmup, arguments.final, arguments.weight_decay
    )


def _groups(arguments: argparse.Namespace) -> Groups:
    """The mesh to train on, which is no part of what defines a run: it may go on on another."""
    topology = topology_of(arguments)
    return Groups(topology, topology.mesh(), arguments.cut_sequences)


def _settings(arguments: argparse.Namespace, optimizer: OptimizerConfig, text: Tokens | Answers) -> dict[str, Any]:
    """What every run is defined by."""
    names = ("preset", "steps", "batch", "length", "seed")
    given = {name: getattr(arguments, name) for name in names}
    return given | {"optimizer": asdict(optimizer), "text": text.digest}


def _named(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def check_length(length: int, config: BackboneConfig) -> None:
    """Raise, before a run is made, if rows do not fit the model."""
    if length > config.max_positions:
        raise TrainingError(f"--length {length} is more than the model's context of {config.max_positions}")


def _trained(folder: Path, like: Params) -> Params:
    """The latest parameters of a run, shaped as `like`."""
    found = Run.latest_params(folder, like)
    if found is None:
        raise TrainingError(f"{folder}: holds no checkpoint of a training run")
    return found


def _plain_text(document: str | Conversation) -> str:
    return document if isinstance(document, str) else "\n".join(m["content"] for m in document)
