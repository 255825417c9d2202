"""Training: the loop that may be killed, the objective, quantisation-aware weights, balance, optimisers and export."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mimo_jax.backbone import Backbone
from mimo_jax.byte_tokenizer import SMALLEST_VOCABULARY, build_byte_tokenizer, write_byte_tokenizer
from mimo_jax.chat_template import ChatTemplate, default_chat_template
from mimo_jax.config import BackboneConfig, DrafterConfig
from mimo_jax.drafter import Drafter
from mimo_jax.evaluation.score import score
from mimo_jax.model import LoadOptions, Model, load_model
from mimo_jax.moe import route
from mimo_jax.params import Declared
from mimo_jax.presets import PRESETS
from mimo_jax.quantization import encode_fp8
from mimo_jax.speculative import ModelParams, Models
from mimo_jax.tokenizer import Tokenizer
from mimo_jax.training import TrainingError
from mimo_jax.training.backbone_training import BackboneTrainer, backbone_step, next_token_loss
from mimo_jax.training.fake_quantization import as_stored
from mimo_jax.training.initialization import initial_params
from mimo_jax.training.loop import Run
from mimo_jax.training.objective import cross_entropy
from mimo_jax.training.optimizers import OptimizerConfig, TrainState, descend, make_optimizer, matrices
from mimo_jax.training.release import write_drafter, write_plain, write_release
from mimo_jax.training.tokens import Tokens, tokenize
from tests.checkpoint_files import MICRO, assert_same
from tests.models import tiny_model

STEPS = 6


def trainer_of(models, *, qat: bool = False, name: Any = "muon", steps: int = STEPS) -> BackboneTrainer:
    config = OptimizerConfig(name=name, learning_rate=1e-2, warmup=2)
    return BackboneTrainer(models.backbone, make_optimizer(models.backbone.axes, config, steps), qat)


def batch_of(seed: int) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(seed).integers(0, 61, (2, 17)).astype(np.int32)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Parameters of the smallest backbone, and a folder with its tokenizer."""
    config = BackboneConfig.from_hf(MICRO.backbone)
    backbone = Declared(lambda: Backbone(config, "float32"))
    params = initial_params(backbone, len(config.layers), seed=5)
    bias = iter(jax.random.split(jax.random.key(1), 8))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            0.1 * jax.random.normal(next(bias), x.shape) if path[-1].key in ("correction_bias", "sink") else x
        ),
        params,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder, MICRO.backbone["vocab_size"])
    return backbone, params, folder


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_with_the_same_losses(tmp_path):
    """Killed between checkpoints, with half a line of metrics written: the end is bit for bit that of one run."""
    axes = {"w": ("heads", "embed"), "norm": ("embed",)}
    optimizer = make_optimizer(axes, OptimizerConfig(learning_rate=0.1, warmup=2), STEPS)
    params = {"w": jnp.ones((4, 8)), "norm": jnp.ones(8)}

    @jax.jit
    def step(state, batch):
        def loss(p):
            return jnp.mean((batch @ (p["w"] * p["norm"]).T) ** 2)

        value, gradients = jax.value_and_grad(loss)(state.params)
        return descend(optimizer, state, gradients), {"loss": value}

    def train(folder, batch):
        start = TrainState(params, optimizer.init(params))
        arguments = {"steps": STEPS, "checkpoint_every": 2, "tokens_per_step": 32, "title": "test"}
        return Run(folder, {"steps": STEPS}).train(start, step, batch, **arguments)

    def batch(number: int) -> np.ndarray:
        return np.random.default_rng(number).standard_normal((5, 8)).astype(np.float32)

    def killing(number: int) -> np.ndarray:
        if number == 5:
            raise Killed
        return batch(number)

    whole = train(tmp_path / "whole", batch)
    with pytest.raises(Killed):
        train(tmp_path / "killed", killing)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    assert_same(whole.params, train(tmp_path / "killed", batch).params)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert [(x["step"], x["loss"]) for x in lines[0]] == [(x["step"], x["loss"]) for x in lines[1]]
    assert [x["step"] for x in lines[1]] == list(range(1, STEPS + 1))
    assert (tmp_path / "killed" / "metrics.png").stat().st_size > 1000
    latest = Run.latest_params(tmp_path / "killed", params)
    assert latest is not None
    assert_same(latest, whole.params)
    # a finished run is not trained further
    assert_same(train(tmp_path / "killed", batch).params, whole.params)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path):
    def step(state, batch):
        return {"x": state["x"] + 1}, {"loss": jnp.where(batch == 3, jnp.nan, 1.0)}

    run = Run(tmp_path / "run", {})
    arguments = {"steps": 6, "checkpoint_every": 2, "tokens_per_step": 1, "title": "t"}
    with pytest.raises(TrainingError, match=r"nan at step 4.* of step 2, is in .*run/checkpoints"):
        run.train({"x": jnp.zeros(3)}, step, jnp.asarray, **arguments)
    restored = run.restore({"x": jnp.zeros(3)})
    assert restored is not None
    assert restored[0] == 2
    np.testing.assert_array_equal(restored[1]["x"], np.full(3, 2.0))


def test_folders_of_other_runs_are_refused(tmp_path):
    Run(tmp_path / "a", {"steps": 5, "rate": 0.1})
    Run(tmp_path / "a", {"steps": 5, "rate": 0.1})
    with pytest.raises(TrainingError, match=r"rate was 0\.1 and is 0\.2"):
        Run(tmp_path / "a", {"steps": 5, "rate": 0.2})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious.txt").write_text("x")
    with pytest.raises(TrainingError, match="no training run"):
        Run(tmp_path / "b", {})
    assert Run.latest_params(tmp_path / "b", {}) is None


@pytest.mark.parametrize("rows", [1, 7, 8, 20])
def test_chunked_cross_entropy_equals_the_plain_one(rows, rng):
    head = jnp.asarray(rng.standard_normal((13, 5)), jnp.float32)
    hidden = jnp.asarray(rng.standard_normal((rows, 5)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 13, rows), jnp.int32)
    weights = jnp.asarray(rng.uniform(0, 1, rows) * (rng.random(rows) < 0.7), jnp.float32)

    def chunked(hidden):
        scores = cross_entropy(lambda x: x @ head.T, hidden, labels, chunk=8)
        return jnp.sum(weights * scores.loss), scores.correct

    def plain(hidden):
        losses = -jnp.take_along_axis(jax.nn.log_softmax(hidden @ head.T), labels[:, None], axis=-1)[:, 0]
        return jnp.sum(weights * losses)

    loss, correct = chunked(hidden)
    np.testing.assert_allclose(loss, plain(hidden), rtol=1e-5)
    np.testing.assert_array_equal(correct, jnp.argmax(hidden @ head.T, axis=-1) == labels)
    got, wanted = jax.grad(lambda h: chunked(h)[0])(hidden), jax.grad(plain)(hidden)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_the_correction_biass_gradient_is_the_load(rng):
    config = tiny_model(3)[0].backbone.module.config.moe
    logits, bias = jnp.asarray(rng.standard_normal((50, 6)), jnp.float32), jnp.asarray(rng.standard_normal(6) * 0.1)
    bias = bias.astype(jnp.float32)
    ids, weights = route(logits, bias, config)
    gradient = jax.grad(lambda b: jnp.sum(route(logits, b, config)[1] ** 2))(bias)
    load = np.bincount(np.asarray(ids).ravel(), minlength=6) / ids.size
    np.testing.assert_allclose(gradient, load - 1 / 6, atol=1e-6)
    assert weights.shape == (50, 2)


def test_experts_even_out():
    """Router columns that prefer one expert, weights that do not move: only the bias can even the load."""
    models, params = tiny_model(3)
    optimizer = make_optimizer(models.backbone.axes, OptimizerConfig(learning_rate=0.0, balance_rate=0.05), 60)
    trainer = BackboneTrainer(models.backbone, optimizer, qat=False)
    state = trainer.start(jax.tree.map(jnp.copy, params.backbone))
    ids = np.random.default_rng(0).integers(0, 61, (8, 33)).astype(np.int32)
    busiest = []
    for _ in range(60):
        state, metrics = backbone_step(trainer, state, {"ids": ids})
        busiest.append(float(metrics["busiest_expert"]))
    assert busiest[0] > 2.0
    assert max(busiest[-5:]) < 1.6


@pytest.mark.parametrize(("name", "qat"), [("muon", True), ("adamw", False)])
def test_the_loss_falls(trained, name, qat):
    backbone, params, _ = trained
    trainer = trainer_of(Models(backbone), qat=qat, name=name, steps=30)
    state = trainer.start(jax.tree.map(jnp.copy, params))
    losses = []
    for _ in range(30):
        state, metrics = backbone_step(trainer, state, batch_of(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]


def test_muon_takes_exactly_the_hidden_matrices():
    """36 matrices of a five-layer drafter: fc and seven a layer. Neither embeddings nor router, norms or sinks."""
    hf = PRESETS["mimo-v2.5-pro"].drafter
    assert hf is not None
    drafter = Declared(lambda: Drafter(DrafterConfig.from_hf(hf), "float32"))
    is_number = lambda x: x is None or hasattr(x, "output_axis")
    chosen = {
        jax.tree_util.keystr(path, simple=True, separator="."): shape.shape
        for (path, number), shape in zip(
            jax.tree.leaves_with_path(matrices(drafter.axes), is_leaf=is_number),
            jax.tree.leaves(drafter.shapes),
            strict=True,
        )
        if number is not None
    }
    assert sorted(chosen) == sorted(
        ["fc", "gate", "up", "down", "attention.q", "attention.k", "attention.v", "attention.o"]
    )
    assert sum(int(np.prod(shape[:-2])) for shape in chosen.values()) == 36
    config = BackboneConfig.from_hf(PRESETS["tiny"].backbone)
    backbone = Declared(lambda: Backbone(config, "float32"))
    left = {
        path[-1].key
        for path, number in jax.tree.leaves_with_path(matrices(backbone.axes), is_leaf=is_number)
        if number is None
    }
    norms = {"attention_norm", "mlp_norm", "final_norm"}
    assert left == norms | {"embedding", "lm_head", "router", "correction_bias", "sink"}


def logits_of(backbone, params, ids) -> np.ndarray:
    model = Model(Models(backbone), ModelParams(params), "float32", None)
    return score(model, ids)["logits"]


@pytest.mark.parametrize("storage", ["packed", "expanded"])
def test_what_qat_trained_is_what_is_stored(trained, tmp_path, storage):
    """Written, quantised and read back: the logits of the forward pass that training saw, bit for bit."""
    backbone, params, tokenizer = trained
    seen = as_stored(params, backbone.axes)
    write_release(tmp_path / "out", MICRO.backbone, seen, tokenizer)
    loaded = load_model(tmp_path / "out", LoadOptions(storage=storage))
    ids = np.arange(60).reshape(2, 30)
    np.testing.assert_array_equal(score(loaded, ids)["logits"], logits_of(backbone, seen, ids))
    assert np.abs(logits_of(backbone, params, ids) - logits_of(backbone, seen, ids)).max() > 1e-3


def test_plain_export_comes_back(trained, tmp_path):
    _, params, tokenizer = trained
    write_plain(tmp_path / "out", MICRO.backbone, params, tokenizer)
    loaded = load_model(tmp_path / "out", LoadOptions(storage="expanded"))  # in the shapes that were written
    rounded = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            x if path[-1].key in ("router", "correction_bias") else x.astype(jnp.bfloat16).astype(jnp.float32)
        ),
        params,
    )
    assert_same(loaded.params.backbone, rounded)
    assert loaded.tokenizer is not None


def test_a_drafter_comes_back(trained, tmp_path):
    backbone, params, tokenizer = trained
    assert MICRO.drafter is not None
    config = DrafterConfig.from_hf(MICRO.drafter)
    drafter = Declared(lambda: Drafter(config, "float32"))
    trained_drafter = initial_params(drafter, config.num_layers, 2)
    trained_drafter["mask_embedding"] = jnp.arange(64, dtype=jnp.float32) / 7
    write_release(tmp_path / "out", MICRO.backbone, as_stored(params, backbone.axes), tokenizer)
    write_drafter(tmp_path / "out" / "dflash", MICRO.drafter, trained_drafter)
    loaded = load_model(tmp_path / "out", LoadOptions(storage="expanded"))  # in the shapes that were written
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), trained_drafter)
    assert_same(loaded.params.drafter, rounded)  # pyright: ignore[reportArgumentType]


def test_gradients_pass_straight_through_the_rounding(trained):
    backbone, params, _ = trained
    ids = jnp.asarray(batch_of(0)["ids"])
    qat, plain = trainer_of(Models(backbone), qat=True), trainer_of(Models(backbone))
    through = jax.jit(jax.grad(lambda p: next_token_loss(qat, p, ids)[0]))(params)
    there = jax.jit(jax.grad(lambda p: next_token_loss(plain, p, ids)[0]))(as_stored(params, backbone.axes))
    for got, wanted in zip(jax.tree.leaves(through), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_fp8_rounding_is_that_of_the_stored_format(rng, scale):
    """Weights of very different sizes that share tiles: what training saw comes back whatever the tiles are."""
    spread = scale * 10.0 ** rng.uniform(-7, 0, (2, 64, 256)) * rng.choice([-1, 1], (2, 64, 256))
    params = {"q": jnp.asarray(spread, jnp.float32), "k": jnp.asarray(spread[:, :32] / 50, jnp.float32)}
    axes = {"q": ("layers", "heads", "embed"), "k": ("layers", "kv_heads", "embed")}
    seen = as_stored(params, axes)
    for layer in range(2):
        fused = np.concatenate([np.asarray(seen["q"][layer]), np.asarray(seen["k"][layer])])
        for block in ((128, 128), (16, 32)):
            values, scales = encode_fp8(fused, block)
            tiles = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[: len(fused), :256]
            np.testing.assert_array_equal(values.astype(np.float32) * tiles, fused)
    relative = np.abs(np.asarray(seen["q"]) - spread) / np.abs(spread)
    assert np.median(relative) < 2**-4
    assert relative[np.abs(spread) > 1e-3 * scale].max() <= 2**-4 * 1.01


def tokenizer_of() -> Tokenizer:
    backend, ids = build_byte_tokenizer(SMALLEST_VOCABULARY)
    return Tokenizer(backend, [ids.im_end], ChatTemplate(default_chat_template(), "default"))


def test_conversations_are_encoded_as_serving_sees_them():
    tokenizer = tokenizer_of()
    turns = tuple({"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd", strict=True))
    tokens = tokenize([turns, "text"], tokenizer)
    end = tokenizer.token_id("<|endoftext|>")
    whole = tokenizer.encode_chat(turns, add_generation_prompt=False)
    assert tokens.ids.tolist() == [*whole, end, *tokenizer.encode("text"), end]
    answers = "".join(tokenizer.decode([i], skip_special=False) for i in tokens.ids[tokens.answer])
    assert answers == "<think></think>b<|im_end|><think></think>d<|im_end|>text<|endoftext|>"
    # what precedes an answer is exactly the prompt that serving would build
    start = int(np.flatnonzero(tokens.answer)[0])
    assert tokens.ids[:start].tolist() == tokenizer.encode_chat(turns[:1])


def test_batches_cover_every_window_once_an_epoch():
    tokens = Tokens(np.arange(105, dtype=np.int32), np.ones(105, bool))
    seen = [tokens.batch(step, 3, 10, seed=1)["ids"] for step in range(10)]
    firsts = np.concatenate(seen)[:, 0]
    for epoch in range(3):
        assert sorted(firsts[10 * epoch : 10 * epoch + 10]) == list(range(0, 100, 10))
    assert firsts[:10].tolist() != firsts[10:20].tolist()
    np.testing.assert_array_equal(tokens.batch(7, 3, 10, seed=1)["ids"], seen[7])


def test_bad_corpora_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="105 tokens, less than one window of 200"):
        Tokens(np.arange(105, dtype=np.int32), np.ones(105, bool)).batch(0, 1, 200, 0)
    path = tmp_path / "train.safetensors"
    with pytest.raises(TrainingError, match=r"train\.safetensors: cannot be read"):
        Tokens.read(path, 10)
    path.write_bytes(b"x")
    with pytest.raises(TrainingError, match=r"train\.safetensors: cannot be read"):
        Tokens.read(path, 10)
    save_file({"ids": np.array([1, 2])}, path)
    with pytest.raises(TrainingError, match="answer"):
        Tokens.read(path, 10)
    save_file({"ids": np.zeros(0, np.int32), "answer": np.zeros(0, bool)}, path)
    with pytest.raises(TrainingError, match="expected ids and answer"):
        Tokens.read(path, 10)
    Tokens(np.array([1, 50], np.int32), np.ones(2, bool)).write(path)
    with pytest.raises(TrainingError, match=r"token 50, the model's vocabulary has 10.*another model"):
        Tokens.read(path, 10)
    assert Tokens.read(path, 51).ids.tolist() == [1, 50]
