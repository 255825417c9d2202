"""The release at its real size, compiled for H200s by a machine that has none."""

import time
from collections import Counter

import jax.numpy as jnp
import pytest

from mimo_jax.abstract import abstract_model
from mimo_jax.layer_loops import Run, stretches
from mimo_jax.model import Model
from mimo_jax.presets import PRESETS
from mimo_jax.request import SamplingParams, batch_requests
from mimo_jax.speculative import PromptChunk, decode, prefill
from sharding.compiled import collectives
from sharding.topology import Topology
from tests.gpu_programs import h200s

pytestmark = pytest.mark.gpu_compile

MEMORY = 141e9
EIGHT = Topology(8, expert_parallel=8)
SIXTEEN = Topology(16, 2, 16, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1)
BATCH, CAPACITY = 2, 4096


def model_of(topology):
    """The release on GPUs of one node or of two."""
    config, drafter = PRESETS["mimo-v2.5-pro"].configs()
    return abstract_model(config, drafter, "bfloat16", topology, topology.mesh(h200s(topology.tensor_parallel // 8, 8)))


def compiled(model, program, *arguments, **statics):
    """The program's text, bytes of a device (arguments, temporaries), and seconds from tracing to machine code."""
    asked = batch_requests([[1]] * BATCH, [SamplingParams()] * BATCH, (), model.config.vocab_size)
    given = (model.state_shapes(BATCH, CAPACITY), model.shaped(asked), *arguments)
    begun = time.perf_counter()
    # tests compile for speed of compilation, which is not what is looked at here
    done = model.lowered(program, given, statics).compile({"xla_backend_optimization_level": 3})
    seconds = time.perf_counter() - begun
    memory = done.memory_analysis()
    assert memory is not None
    return done.as_text() or "", memory.argument_size_in_bytes + memory.temp_size_in_bytes, seconds


def bodies(model: Model) -> list[Run]:
    """The runs of layers that the program has, each once for all times that it is repeated."""
    return [run for stretch in stretches(model.config.layers, model.models.capture) for run in stretch[0]]


@pytest.mark.parametrize("topology", [EIGHT, SIXTEEN], ids=["8 GPUs", "16 GPUs"])
def test_decode(topology):
    model = model_of(topology)
    text, memory, seconds = compiled(model, decode, rounds=8, verify_length=8)
    print(f"{topology.tensor_parallel} H200: {seconds:.1f} s to compile, {memory / 1e9:.1f} GB a device")
    assert memory < MEMORY
    layers = bodies(model)
    moe = sum(run.kind.mlp == "moe" for run in layers)
    found = list(collectives(text))
    counted = Counter(kind for kind, _ in found)
    groups = topology.data_parallel > 1
    assert counted["reduce-scatter"] == (moe if groups else 0)
    assert counted["all-gather"] >= (moe if groups else 0)  # the compiler joins those of one layer
    dense = sum(run.kind.mlp == "dense" for run in layers) if topology.width("mlp") > 1 else 0
    assert counted["all-reduce"] == len(layers) + moe + dense + 2 + 2 + groups
    assert not {"all-to-all", "ragged-all-to-all", "collective-permute"} & set(counted)
    one_expert_matrix = model.config.moe.intermediate * model.config.hidden_size // 2
    logits = BATCH // topology.data_parallel * 8 * model.config.vocab_size * 4  # gathered where a request truncates
    assert not [size for _, size in found if size >= one_expert_matrix and size != logits], "no weight is sent anywhere"


def test_prefill_of_many_tokens_sends_rows_to_their_experts():
    model = model_of(SIXTEEN)
    tokens, counts, last = jnp.zeros((BATCH, 2048), jnp.int32), jnp.zeros(BATCH, jnp.int32), jnp.zeros(BATCH, bool)
    chunk = PromptChunk(tokens, counts, last)
    text, memory, _ = compiled(model, prefill, model.shaped(chunk))
    moe = sum(run.kind.mlp == "moe" for run in bodies(model))
    counted = Counter(kind for kind, _ in collectives(text))
    assert counted["ragged-all-to-all"] == 4 * moe  # rows, ids and weights; sums on the way back
    assert memory < MEMORY
