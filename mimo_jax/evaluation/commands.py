"""What `mimo-jax bench` and `mimo-jax eval` do, one function each, given parsed arguments."""

import argparse

import jax

from mimo_jax.arguments import load_generator, load_options
from mimo_jax.devices import known_devices
from mimo_jax.evaluation import pictures, tables
from mimo_jax.evaluation.acceptance import measure
from mimo_jax.evaluation.bench import as_json, bench_context, bench_decode
from mimo_jax.evaluation.compiling import bench_compile
from mimo_jax.evaluation.loading import bench_load
from mimo_jax.evaluation.prompts import load
from mimo_jax.evaluation.quality import compare_exact, compare_perplexity, exact_answers, losses
from mimo_jax.evaluation.reporting import check_outputs, report
from mimo_jax.evaluation.scenarios import SCENARIOS, held_out_texts, prompts
from mimo_jax.evaluation.shard import bench_shard, random_model, share
from mimo_jax.evaluation.signals import DEVICES, bench_signals
from mimo_jax.evaluation.speed import compare_speed
from mimo_jax.generate import Generator
from mimo_jax.plan import default_topology
from mimo_jax.plan_report import topology_words
from mimo_jax.presets import PRESETS
from mimo_jax.progress import counting_bar, loading_bar
from mimo_jax.request import SamplingParams


def bench_decode_command(arguments: argparse.Namespace) -> None:
    """`mimo-jax bench decode`."""
    check_outputs(arguments.json)
    model = load_generator(arguments).model
    wanted = {"batch": arguments.batch, "runs": arguments.runs}
    tokens = {"prompt_tokens": arguments.prompt_tokens, "new_tokens": arguments.new_tokens}
    block = model.drafter_config.block_size if model.drafter_config else 1
    decoded = [bench_decode(model, verify_length=v, **wanted, **tokens) for v in dict.fromkeys((1, block))]
    timed = [bench_context(model, context=c, **wanted) for c in arguments.contexts]
    shown = [tables.decode(decoded)] + ([tables.context(timed, model)] if timed else [])
    results = {"decode": as_json(decoded), "context": as_json(timed)}
    report("mimo-jax", shown, results, f"{model.dtype}, batch {arguments.batch}", arguments.json)


def bench_scenarios(arguments: argparse.Namespace) -> None:
    """`mimo-jax bench scenarios`."""
    check_outputs(arguments.json)
    generator = load_generator(arguments)
    params = SamplingParams(max_new_tokens=arguments.max_new_tokens)
    asked = _asked(generator, arguments)
    total = sum(map(len, asked.values())) * 2 * (arguments.runs + 1)
    with counting_bar("answers", total) as advance:
        found = [
            compare_speed(generator, name, ids, params, runs=arguments.runs, progress=advance)
            for name, ids in asked.items()
        ]
    report(
        "mimo-jax", [tables.speed(found)], {"speed": [r.as_json() for r in found]}, "greedy, batch 1", arguments.json
    )


def bench_load_command(arguments: argparse.Namespace) -> None:
    """`mimo-jax bench load`."""
    check_outputs(arguments.json)
    with loading_bar() as progress:
        found = bench_load(arguments.model, load_options(arguments), runs=arguments.runs, progress=progress)
    report(
        "mimo-jax", [tables.loading(found)], {"load": [r.as_json() for r in found]}, "page cache warm", arguments.json
    )


def bench_shard_command(arguments: argparse.Namespace) -> None:
    """`mimo-jax bench shard`."""
    check_outputs(arguments.json)
    config, drafter = share(*PRESETS[arguments.preset].configs(), arguments.devices)
    here = jax.devices()[0]
    dtype = "float32" if here.platform == "cpu" else "bfloat16"
    known = {name.lower(): device for name, device in known_devices().items()}
    device = next((d for name, d in known.items() if name in here.device_kind.lower().split()), None)
    model = random_model(config, drafter, dtype)
    with counting_bar("rounds", len(arguments.batches) * len(arguments.contexts)) as advance:
        found = []
        for result in bench_shard(model, device, arguments.batches, arguments.contexts, arguments.runs):
            found.append(result)
            advance(1)
    more = f"1/{arguments.devices} of {arguments.preset}, {dtype}"
    report("mimo-jax", [tables.shard(found)], {"shard": [r.as_json() for r in found]}, more, arguments.json)


def bench_compile_command(arguments: argparse.Namespace) -> None:
    """`mimo-jax bench compile`."""
    check_outputs(arguments.json)
    found = bench_compile(arguments.preset, arguments.devices, runs=arguments.runs)
    named = f"{arguments.preset} on {arguments.devices} devices: {topology_words(default_topology(arguments.devices))}"
    report("mimo-jax", [tables.compiling(found)], {"compile": [r.as_json() for r in found]}, named, arguments.json)


def bench_signals_command(arguments: argparse.Namespace) -> None:
    """`mimo-jax bench signals`."""
    check_outputs(arguments.json, arguments.picture)
    asked = arguments.preset, arguments.length, arguments.anchors
    with counting_bar("cases", len(DEVICES) * 4) as advance:
        found = bench_signals(*asked, runs=arguments.runs, progress=advance)
    more = f"{arguments.preset}'s drafter, float32; devices share the cores"
    report("mimo-jax", [tables.signals(found)], {"signals": [r.as_json() for r in found]}, more, arguments.json)
    if arguments.picture:
        pictures.signals(found, arguments.picture)


def eval_acceptance(arguments: argparse.Namespace) -> None:
    """`mimo-jax eval acceptance`."""
    check_outputs(arguments.json, arguments.picture)
    generator = load_generator(arguments)
    asked = _asked(generator, arguments)
    found = []
    with counting_bar("answers", 2 * sum(map(len, asked.values()))) as advance:
        for temperature in (0.0, 1.0):
            params = SamplingParams(max_new_tokens=arguments.max_new_tokens, temperature=temperature)
            for name, ids in asked.items():
                found.append(measure(generator, name, ids, params, batch=arguments.batch, progress=advance))
    report(
        "mimo-jax",
        [tables.acceptance(found)],
        {"acceptance": [r.as_json() for r in found]},
        generator.model.dtype,
        arguments.json,
    )
    if arguments.picture:
        pictures.acceptance(found, arguments.picture)


def eval_quality(arguments: argparse.Namespace) -> None:
    """`mimo-jax eval quality`."""
    check_outputs(arguments.json, arguments.picture)
    both = [Generator.load(folder, drafter="none") for folder in (arguments.against, arguments.model)]
    tokenizer = both[0].tokenizer
    if any(tokenizer.encode(text) != both[1].tokenizer.encode(text) for text in ("Once upon a time", "x = 1")):
        raise ValueError(f"{arguments.model} and {arguments.against} have different tokenizers: nothing to compare")
    longest = min(g.model.config.max_positions for g in both)
    texts = {name: held_out_texts(tokenizer, name, arguments.texts, longest) for name in SCENARIOS}
    checked = ("math", "edits", "code") if arguments.run_code else ("math", "edits")
    with counting_bar("texts", 2 * sum(map(len, texts.values()))) as advance:
        lost = {name: [losses(g, t, lambda: advance(1)) for g in both] for name, t in texts.items()}
        right = {name: [exact_answers(g, load(name)) for g in both] for name in checked}
    found = [compare_perplexity(f"perplexity, {name}", first, second) for name, (first, second) in lost.items()]
    found += [compare_exact(f"exact answers, {name}", first, second) for name, (first, second) in right.items()]
    named = f"{arguments.model} against {arguments.against}"
    report("mimo-jax", [tables.quality(found)], {"quality": [r.as_json() for r in found]}, named, arguments.json)
    if arguments.picture:
        pictures.quality(found, arguments.picture)


def _asked(generator: Generator, arguments: argparse.Namespace) -> dict[str, list[list[int]]]:
    names = dict.fromkeys(arguments.scenario or SCENARIOS)
    return {name: prompts(generator.tokenizer, name)[: arguments.prompts] for name in names}
