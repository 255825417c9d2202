"""What `mimo-jax train ablate` does, given parsed arguments."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from mimo_jax.evaluation import pictures, tables
from mimo_jax.evaluation.reporting import check_outputs, report
from mimo_jax.evaluation.scenarios import SCENARIOS, prompts
from mimo_jax.generate import Generator
from mimo_jax.model import Model
from mimo_jax.progress import counting_bar
from mimo_jax.request import SamplingParams
from mimo_jax.speculative import ModelParams, Models
from mimo_jax.training import TrainingError
from mimo_jax.training.ablation import ArmTrainer, Budget, measure
from mimo_jax.training.ablation_results import effects, read_results
from mimo_jax.training.answers import Answers
from mimo_jax.training.arms import ARMS, BASE
from mimo_jax.training.commands import check_length
from mimo_jax.training.loop import Run
from mimo_jax.training.prompts import asked
from mimo_jax.training.regeneration import regenerate

_LONGEST_ANSWER, _LONGEST_FROZEN = 512, 256


def train_ablate(arguments: argparse.Namespace) -> None:
    """`mimo-jax train ablate`."""
    out: Path = arguments.out
    model = Generator.load(arguments.model, storage="expanded", dtype="float32").model
    base = model.drafter_config
    if base is None:
        raise TrainingError(f"{arguments.model}: has no drafter, whose shape the arms are to have")
    check_length(arguments.length, model.config)
    budget = Budget(
        arguments.steps, arguments.batch, arguments.length, arguments.anchors, learning_rate=arguments.learning_rate
    )
    asked_for = {"prompts": arguments.prompts, "held_out": arguments.held_out, "prompts_seed": arguments.prompts_seed}
    Run(out, {"model": str(arguments.model.absolute())} | asked_for | asdict(budget))  # refuses a folder of another
    check_outputs(out / "ablation.json", out / "ablation.png")
    training, held_out = _texts(model, arguments)
    arms = list(dict.fromkeys([BASE, *(arguments.arm or ARMS)]))
    path = out / "results.jsonl"
    finished = read_results(path)
    path.write_text("".join(json.dumps(result) + "\n" for result in finished), encoding="utf-8")  # whole lines only
    done = {(result["arm"], result["seed"]) for result in finished}
    left = [(arm, seed) for seed in range(arguments.seeds) for arm in arms if (arm, seed) not in done]
    trainers = {arm: ArmTrainer(ARMS[arm], model.models.backbone, base, budget) for arm in {arm for arm, _ in left}}
    frozen = model.params.backbone
    with counting_bar("steps", len(left) * budget.steps) as advance, path.open("a", encoding="utf-8") as file:
        for arm, seed in left:
            begin = time.perf_counter()
            trainer = trainers[arm]
            params, metrics = trainer.train(frozen, training[ARMS[arm].answers], seed, advance)
            measured = measure(trainer, frozen, params, held_out, base.block_size)
            line = {"arm": arm, "seed": seed, "metrics": metrics, "measured": measured}
            file.write(json.dumps(line | {"seconds": round(time.perf_counter() - begin, 1)}) + "\n")
            file.flush()
            print(f"{arm}, seed {seed}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    wanted = [r for r in read_results(path) if r["arm"] in arms and r["seed"] < arguments.seeds]
    found = list(effects(wanted, BASE))
    more = f"{budget.steps} steps of {budget.anchors} blocks, {arguments.prompts} prompts, {arguments.seeds} seeds"
    results = {"ablation": [effect.as_json() for effect in found]}
    report("mimo-jax", [tables.ablation(found)], results, more, out / "ablation.json")
    pictures.ablation(found, out / "ablation.png")


def _texts(model: Model, arguments: argparse.Namespace) -> tuple[dict[str, Answers], dict[str, Answers]]:
    """Answers to train on, by whose they are, and held-out ones: to prompts of the same kinds, and to the frozen ones
    that acceptance is measured with.
    """
    alone = replace(model, models=Models(model.models.backbone), params=ModelParams(model.params.backbone))
    assert model.tokenizer is not None

    def answered(name: str, given: Sequence[Sequence[int]], longest: int) -> list[tuple[list[int], list[int]]]:
        path = arguments.out / name
        with counting_bar(name, len(given)) as advance:
            regenerate(Generator(alone), given, SamplingParams(longest), path, batch=128, progress=advance)
        return Answers.read(path, model.config.vocab_size).pairs

    count = arguments.prompts
    given = list(islice(asked(model.tokenizer, arguments.prompts_seed), count + arguments.held_out))
    own = answered("answers.jsonl", [prompt for prompt, _ in given], _LONGEST_ANSWER)
    documents = [(prompt, answer[:_LONGEST_ANSWER]) for prompt, answer in given[:count]]
    seen = {tuple(prompt) for prompt, _ in given[:count]}
    held_out = [(prompt, answer) for prompt, answer in own[count:] if tuple(prompt) not in seen]
    if not held_out:
        raise TrainingError(f"all {arguments.held_out} held-out prompts are trained on, too: choose more of them")
    frozen = [ids for scenario in SCENARIOS for ids in prompts(model.tokenizer, scenario)]
    training = {"own": Answers(own[:count]), "documents": Answers(documents)}
    return training, {
        "held-out": Answers(held_out),
        "frozen": Answers(answered("frozen.jsonl", frozen, _LONGEST_FROZEN)),
    }
