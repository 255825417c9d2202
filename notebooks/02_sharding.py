# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The release's mesh on sixteen devices
#
# The release is launched with `--tp-size 16 --ep-size 16 --dp-size 2 --enable-dp-attention`. Here is what these
# numbers mean: which device holds what, and what devices tell each other in a round.
#
# All of it runs on sixteen *fake* devices, slices of one CPU that XLA treats as sixteen. Where there are sixteen GPUs,
# leave out the next cell.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "16"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiles in half the time; nothing is timed here

# %%
from collections import Counter

import matplotlib.pyplot as plt
import treescope

from mimo_jax import Generator, Topology
from mimo_jax.abstract import abstract_model
from mimo_jax.placement import holdings
from mimo_jax.presets import PRESETS
from mimo_jax.request import SamplingParams, batch_requests
from mimo_jax.speculative import decode
from sharding.compiled import collectives

release = Topology(
    tensor_parallel=16,
    data_parallel=2,
    expert_parallel=16,
    dp_attention=True,
    dp_lm_head=True,
    dense_tensor_parallel=1,
)
config, drafter = PRESETS["mimo-v2.5-pro"].configs()
print("mesh:", release.axes)
for logical in ("batch", "heads", "kv_heads", "expert", "expert_inner", "vocab", "mlp", "embed"):
    print(f"  {logical:13s} is cut over {release.rules[logical]}")

# %% [markdown]
# Sixteen devices are a mesh of `data` 2 x `tensor` 8. Arrays name their dimensions, and one table says which mesh axis
# cuts which name: that is all the model knows about devices.
#
# ## Who holds what
#
# The picture has a device a row. *Heads* and *vocabulary* are cut over the eight devices of a group, and both groups
# have all of them: each group attends to its own sequences. *Experts* are cut over all sixteen: a device has 24 of a
# layer's 384, and every token's rows travel to them. Weights of experts are nearly all of the model, which is why they
# are the ones that no two devices share.

# %%
held = holdings(release, config, drafter)
parts = {
    "query heads": [h.heads for h in held],
    "KV heads": [h.kv_heads["full"] for h in held],
    "experts of a layer": [h.experts for h in held],
    "vocabulary, thousands": [(h.vocabulary[0] / 1e3, h.vocabulary[1] / 1e3) for h in held],
}
figure, axes = plt.subplots(1, 4, figsize=(12, 4), sharey=True, layout="constrained")
for axis, (name, ranges) in zip(axes, parts.items(), strict=True):
    for one, (first, end) in zip(held, ranges, strict=True):
        axis.barh(one.device, end - first, left=first, color=("tab:blue", "tab:orange")[one.data])
    axis.set(xlabel=name, xlim=(0, max(end for _, end in ranges)), ylim=(15.6, -0.6))
    axis.grid(alpha=0.3)
axes[0].set(ylabel="device", yticks=range(16))
handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in ("tab:blue", "tab:orange")]
figure.legend(handles, ["data-parallel group 0", "group 1"], loc="outside upper center", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# ## The same, of arrays that exist
#
# The small model in the package, loaded over the same mesh, packed as an accelerator would hold it. Attention's output
# projection [layers, out, in] is cut along its inputs, by heads, and both groups have all of it; hover over a cell to
# see which devices have that part.

# %%
generator = Generator.load(topology=release, storage="packed", progress=False)
params = generator.model.params.backbone
treescope.render_array_sharding(params["layers"]["full_moe"]["attention"]["o"])

# %% [markdown]
# The codes of experts' down projections [layers, experts, out, in / 2]: one of 16 experts a device.

# %%
treescope.render_array_sharding(params["layers"]["swa_moe"]["mlp"]["down"].codes)

# %% [markdown]
# And it decodes. A program is written for one device, and says where it needs the others; tokens are those of one
# device.

# %%
question = [{"role": "user", "content": "What is the capital of France?"}]
spread = generator.chat(question, max_new_tokens=40)
alone = Generator.load(progress=False).chat(question, max_new_tokens=40)
assert spread.token_ids == alone.token_ids
print(spread.text)

# %% [markdown]
# ## What a round exchanges, at the real size
#
# The 1.02T model has no weights here, but a compiler needs none: `abstract_model` has shapes, dtypes and places. This
# compiles its decode program, eight rounds of draft and verify, for the sixteen devices (half a minute), and reads the
# collectives out of the result. Layers of one kind in a row are one loop, so a collective in the program runs once a
# layer of its loop.

# %%
batch, context = 2, 4096
model = abstract_model(config, drafter, "bfloat16", release, release.mesh())
requests = model.shaped(batch_requests([[1]] * batch, [SamplingParams()] * batch, (), config.vocab_size))
state = model.state_shapes(batch, context)
program = model.lowered(decode, (state, requests), {"rounds": 8, "verify_length": 8}).compile()
found = list(collectives(program.as_text()))
print(f"{len(found)} collectives in the program: {dict(Counter(kind for kind, _ in found))}")

# %% [markdown]
# Each dot is a collective, in the program's order, at the size of what it exchanges for two sequences. The bands are
# rows of activations on their way to experts (10⁵ to 10⁶ bytes) and the choices of experts (hundreds of bytes). The
# one large dot gathers whole logits, and runs only where a request asks for top-p or its like; all others pick tokens
# from the largest logits alone. The line is a single matrix of a single expert: no collective moves weights.

# %%
one_matrix = config.moe.intermediate * config.hidden_size // 2
figure, axis = plt.subplots(figsize=(10, 4), layout="constrained")
for kind in sorted({kind for kind, _ in found}):
    at = [(i, size) for i, (k, size) in enumerate(found) if k == kind]
    axis.scatter(*zip(*at, strict=True), label=f"{kind} ({len(at)})", s=22)
axis.axhline(one_matrix, color="black", lw=1)
axis.text(0, one_matrix * 1.3, f"one matrix of one expert in MXFP4: {one_matrix / 1e6:.1f} MB", va="bottom")
axis.set(yscale="log", ylim=(1, one_matrix * 12), xlabel="collective, in the program's order", ylabel="bytes exchanged")
at, most = max(enumerate(size for _, size in found), key=lambda pair: pair[1])
axis.annotate("logits, for top-p", (at, most), (at + 4, most / 3), va="center", arrowprops={"arrowstyle": "-"})
assert most < one_matrix
axis.grid(alpha=0.3)
figure.legend(loc="outside upper center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# A sum of bytes is not yet time: `06_plan_and_roofline` multiplies by layers and divides by links.
