"""What the subcommands of `mimo-jax` do, one function each, given parsed arguments."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mimo_jax import plan_report
from mimo_jax.arguments import load_generator, output_file, topology_of
from mimo_jax.config import BackboneConfig, DrafterConfig, drafter_folder
from mimo_jax.devices import known_devices, parse_devices
from mimo_jax.evaluation.score import score as score_ids
from mimo_jax.evaluation.score import score_draft as score_blocks
from mimo_jax.generate import Completion, Generator, Prompt
from mimo_jax.inspection import describe, report
from mimo_jax.placement import draw, holdings
from mimo_jax.plan import ModelShapes, Plan, default_topology
from mimo_jax.presets import PRESETS
from mimo_jax.progress import loading_bar, output_console
from mimo_jax.quantize import quantize_checkpoint
from mimo_jax.request import SamplingParams
from mimo_jax.session import Decoding
from mimo_jax.stats import DecodeStats
from mimo_jax.synthesize import synthesize as write_synthetic
from sharding.distributed import agree
from sharding.topology import Topology


def generate(arguments: argparse.Namespace) -> None:
    """`mimo-jax generate`."""
    params = SamplingParams(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        logit_bias=dict(map(_bias, arguments.logit_bias)),
        seed=arguments.seed,
        stop=tuple(arguments.stop),
        stop_token_ids=tuple(arguments.stop_token_id),
        ignore_eos=arguments.ignore_eos,
    )
    asked = _prompts(arguments)
    if any(_shape(prompt) != "ids" for prompt in asked) and arguments.model.is_dir():
        tokenizer = arguments.model / "tokenizer.json"
        if (arguments.model / "config.json").exists() and not tokenizer.exists():
            raise ValueError(f"{tokenizer}: no such file; give --prompt-ids, or a checkpoint with a tokenizer")
    decoding = Decoding(arguments.verify_length, arguments.rounds_per_dispatch, arguments.sampled_drafts)
    agree({"prompts or settings": (asked, params, decoding, topology_of(arguments))})
    generator = load_generator(arguments)
    prompts = [_rendered(generator, prompt, not arguments.no_thinking) for prompt in asked]
    completions = generator.completions(prompts)
    alone = len(prompts) == 1 and not arguments.json
    for piece in generator.stream_batch(completions, params, decoding=decoding):
        if alone:
            print(piece.text, end="", flush=True)
    stats = sum((c.stats for c in completions), DecodeStats())
    if arguments.json:
        for completion in completions:
            print(json.dumps(_as_json(completion, arguments.trace), ensure_ascii=False))
        print(json.dumps({"total": stats.as_json(), "seconds": asdict(generator.timing)}))
    elif alone:
        print("" if generator.model.tokenizer else json.dumps(completions[0].token_ids))
    else:
        for i, completion in enumerate(completions):
            shown = completion.text if generator.model.tokenizer else json.dumps(completion.token_ids)
            print(f"=== prompt {i}\n{shown}")
    if not arguments.json:
        print(_statistics(stats, generator), file=sys.stderr)


def inspect(arguments: argparse.Namespace) -> None:
    """`mimo-jax inspect`."""
    description = describe(arguments.folder, arguments.qkv_layout)
    if arguments.json:
        print(json.dumps(description, indent=2))
    else:
        report(description, output_console())


def topology(arguments: argparse.Namespace) -> None:
    """`mimo-jax topology`."""
    chosen = topology_of(arguments)
    config, drafter = _configs(arguments)
    found = holdings(chosen, config, drafter)
    if arguments.json:
        described = {"mesh": chosen.axes, "rules": dict(chosen.rules), "devices": [h.as_json() for h in found]}
        print(json.dumps(described))
    else:
        draw(chosen, found, output_console())


def plan(arguments: argparse.Namespace) -> None:
    """`mimo-jax plan`."""
    count, device = parse_devices(arguments.devices, known_devices(arguments.device_file))
    chosen, default = planned_topology(arguments, count)
    config, drafter = _configs(arguments)
    block = drafter.block_size if drafter else 1
    planned = Plan(
        ModelShapes.of(config, drafter),
        chosen,
        device,
        batch=arguments.batch,
        context=arguments.context or min(131072, config.max_positions),
        verify_length=arguments.verify_length or block,
    )
    accepted = planned.verify_length if arguments.accepted_length is None else arguments.accepted_length
    described = plan_report.describe(planned, accepted)
    if arguments.scaling:
        described["scaling"] = plan_report.scaling(planned)
    if arguments.plot is not None:
        plan_report.plot(planned, output_file(arguments.plot))
    if arguments.json:
        print(json.dumps(described))
    else:
        console, mesh = output_console(), " x ".join(f"{axis} {size}" for axis, size in chosen.axes.items())
        said = f"{plan_report.topology_words(chosen)}{' (by default)' if default else ''}; mesh {mesh}"
        name = arguments.preset or arguments.model
        plan_report.report(planned, described, console, f"{name} on {count} x {device.name}: {said}")
        if arguments.scaling:
            console.print()
            plan_report.report_scaling(described["scaling"], console)
    if not described["fits"]:
        raise ValueError(planned.shortage())


def planned_topology(arguments: argparse.Namespace, count: int) -> tuple[Topology, bool]:
    """The topology asked for over `count` devices, or the default one, and whether it is that."""
    sizes = ("tensor_parallel_size", "data_parallel_size", "expert_parallel_size", "moe_dense_tp_size")
    said = any(getattr(arguments, name) is not None for name in sizes)
    if not (said or arguments.enable_dp_attention or arguments.enable_dp_lm_head):
        return default_topology(count), True
    if arguments.tensor_parallel_size not in (None, count):
        raise ValueError(
            f"--devices names {count} devices and --tp-size {arguments.tensor_parallel_size}; they must agree"
        )
    arguments.tensor_parallel_size = count
    arguments.data_parallel_size = arguments.data_parallel_size or 1
    arguments.expert_parallel_size = arguments.expert_parallel_size or count
    return topology_of(arguments), False


def _configs(arguments: argparse.Namespace) -> tuple[BackboneConfig, DrafterConfig | None]:
    """The configurations of a preset, or of a folder and its drafter."""
    if arguments.preset is not None:
        return PRESETS[arguments.preset].configs()
    drafter = drafter_folder(arguments.model)
    return (
        BackboneConfig.from_folder(arguments.model),
        None if drafter is None else DrafterConfig.from_folder(drafter),
    )


def synthesize(arguments: argparse.Namespace) -> None:
    """`mimo-jax synthesize`."""
    write_synthetic(arguments.preset, arguments.out, seed=arguments.seed, overwrite=arguments.overwrite)
    print(f"wrote {arguments.out}", file=sys.stderr)


def quantize(arguments: argparse.Namespace) -> None:
    """`mimo-jax quantize`."""
    with loading_bar() as progress:
        quantize_checkpoint(
            arguments.model,
            arguments.out,
            linears=arguments.linears,
            qkv_layout=arguments.qkv_layout,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(f"wrote {arguments.out}", file=sys.stderr)


def score(arguments: argparse.Namespace) -> None:
    """`mimo-jax score`."""
    ids, out = _read_ids(arguments.ids), output_file(arguments.out)
    arguments.drafter = "none"
    model = load_generator(arguments).model
    with _naming(arguments.ids):
        scored = score_ids(model, ids, chunk=arguments.chunk, hidden_states=arguments.hidden_states)
    save_file(scored, out)


def score_draft(arguments: argparse.Namespace) -> None:
    """`mimo-jax score-draft`."""
    given, out = _read_safetensors(arguments.features, "features", "anchors"), output_file(arguments.out)
    model = load_generator(arguments).model
    with _naming(arguments.features):
        scored = score_blocks(model, given["features"], given["anchors"], given.get("positions"))
    save_file(scored, out)


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition(":")
    try:
        return int(token), float(value)
    except ValueError:
        raise ValueError(f"--logit-bias takes ID:BIAS, such as 42:-5, not {text!r}") from None


def _prompts(arguments: argparse.Namespace) -> list[Any]:
    """Strings, lists of ids, or lists of chat messages; their shapes are checked before anything is loaded."""
    if arguments.prompt:
        return arguments.prompt
    if arguments.prompt_ids:
        return [_shaped(_json(text, "--prompt-ids"), "--prompt-ids", "ids") for text in arguments.prompt_ids]
    if arguments.ask is not None:
        return [[{"role": "user", "content": arguments.ask}]]
    if arguments.chat:
        text = sys.stdin.read() if arguments.chat == "-" else _text(Path(arguments.chat))
        return [_shaped(_json(text, f"--chat {arguments.chat}"), f"--chat {arguments.chat}", "chat")]
    if arguments.prompt_file:
        path, lines = arguments.prompt_file, _text(arguments.prompt_file).splitlines()
        numbered = [(f"{path}:{i}", line) for i, line in enumerate(lines, 1) if line.strip()]
        if not numbered:
            raise ValueError(f"{path}: holds no prompt")
        if path.suffix == ".jsonl":
            return [_shaped(_json(line, where), where, "text", "ids", "chat") for where, line in numbered]
        return [line for _, line in numbered]
    if sys.stdin.isatty():
        raise ValueError(
            "no prompt: give --ask or --prompt TEXT, --prompt-file, --chat or --prompt-ids, or pipe text in"
        )
    return [sys.stdin.read()]


_SHAPES = {"text": "a string", "ids": "a list of token ids", "chat": "a list of chat messages"}


def _shape(prompt: Any) -> str | None:
    match prompt:
        case str():
            return "text"
        case [int(), *_] if all(type(i) is int for i in prompt):
            return "ids"
        case [dict(), *_] if all(isinstance(m, dict) for m in prompt):
            return "chat"
    return None


def _shaped(prompt: Any, where: str, *allowed: str) -> Any:
    if _shape(prompt) not in allowed:
        wanted = " or ".join(_SHAPES[name] for name in allowed)
        raise ValueError(f"{where}: a prompt must be {wanted}, not {prompt!r:.80}")
    return prompt


def _rendered(generator: Generator, prompt: Any, thinking: bool) -> Prompt:
    if _shape(prompt) == "chat":
        return generator.tokenizer.encode_chat(prompt, enable_thinking=None if thinking else False)
    return prompt


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None


def _as_json(completion: Completion, trace: bool) -> dict[str, Any]:
    result: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "accept_lengths": [r.accepted + 1 for r in completion.rounds],
        **completion.stats.as_json(),
    }
    return result | {"trace": [asdict(r) for r in completion.rounds]} if trace else result


def _statistics(stats: DecodeStats, generator: Generator) -> str:
    timing = generator.timing
    positions = " ".join(f"{a:.0%}" for a in stats.acceptance)
    speed = f"{stats.round_tokens / timing.decode:.1f} tokens/s" if timing.decode else "no rounds"
    parts = [
        f"{stats.new_tokens} tokens",
        speed,
        f"{stats.rounds} rounds",
        f"accepted length {stats.accepted_length:.2f} (tokens emitted over rounds)",
        f"accepted per position {positions}" if positions else "no drafts",
        f"prefill {stats.prompt_tokens} tokens in {timing.prefill:.2f} s, compile {timing.compile:.1f} s",
    ]
    return "[" + ", ".join(parts) + "]"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What cannot be done with a file's contents is said with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_ids(path: Path) -> np.ndarray:
    if path.suffix == ".safetensors":
        return np.atleast_2d(_read_safetensors(path, "input_ids")["input_ids"])
    rows = _json(_text(path), str(path))
    rows = rows if rows and isinstance(rows, list) and isinstance(rows[0], list) else [rows]
    whole = all(isinstance(row, list) and row and all(type(i) is int for i in row) for row in rows)
    if not whole or len({len(row) for row in rows}) != 1:
        raise ValueError(f"{path}: expected a JSON list of token ids, or a list of such lists of one length")
    return np.array(rows)


def _read_safetensors(path: Path, *names: str) -> dict[str, np.ndarray]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{path}: no tensor {missing[0]!r}; it holds {', '.join(sorted(tensors)) or 'none'}")
    return tensors
