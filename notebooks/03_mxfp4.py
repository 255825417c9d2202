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
# # MXFP4: codes, scales, errors
#
# Experts hold nearly all of the model's parameters, and the release stores them in MXFP4: 4-bit codes in blocks of 32
# that share a power of two. Here are the codes and scales of a trained expert, what rounding costs and where, what
# training for it changes, and the bytes saved.

# %%
import json

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import treescope
from matplotlib.colors import LogNorm

from mimo_jax import Generator
from mimo_jax.devices import known_devices
from mimo_jax.plan import ModelShapes, Plan, default_topology
from mimo_jax.presets import NANO, PRESETS
from mimo_jax.quantization import dequantize
from mimo_jax.training.fake_quantization import as_stored
from pallas_kernels import mxfp4

model = Generator.load(storage="packed", progress=False).model
down = model.params.backbone["layers"]["swa_moe"]["mlp"]["down"]
print(f"codes {down.codes.dtype} {down.codes.shape}, scales {down.scales.dtype} {down.scales.shape}")

# %% [markdown]
# ## Sixteen values, and a power of two
#
# Two codes lie in a byte. A code is a sign and one of eight magnitudes, an e2m1 floating-point number; a scale byte u
# stands for 2^(u - 127). The magnitudes are not evenly spaced: half a step near zero, two steps at the top.
#
# Below are the bytes of the first expert's first 32 rows. The codes look like noise, as they should: a code that
# repeats would be bits wasted. The scales, one for 32 weights, hardly differ.

# %%
codes, scales = np.asarray(down.codes[0, 0]), np.asarray(down.scales[0, 0])  # [out, in / 2], [out, in / 32]
nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)
treescope.render_array(nibbles[:32], axis_labels={0: "outputs", 1: "inputs"}, around_zero=False, continuous=True)

# %%
treescope.render_array(scales[:32].astype(int) - 127, axis_labels={0: "outputs", 1: "blocks"}, continuous=True)

# %% [markdown]
# How often is each code used? Nearly evenly: of the 4 bits that a code takes, it carries 3.9. Negative zero is a code,
# too: it is what small negative weights become.

# %%
everything = np.asarray(down.codes).ravel()
used = np.bincount(np.concatenate([everything & 15, everything >> 4]), minlength=16) / (2 * everything.size)
order = [*range(15, 7, -1), *range(8)]
names = [f"{'-' if code > 7 else ''}{mxfp4.MAGNITUDES[code % 8]:g}" for code in order]
exponents, counts = np.unique(np.asarray(down.scales).astype(int) - 127, return_counts=True)
bits = -np.sum(used * np.log2(used))

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", width_ratios=(2, 1))
left.bar(range(16), 100 * used[order])
left.set_xticks(range(16), names)
left.set(xlabel="value of a code, before its scale", ylabel="share of the weights, %")
left.set_title(f"entropy {bits:.2f} of 4 bits", fontsize="medium")
right.bar(exponents, 100 * counts / counts.sum())
right.set_xticks(exponents, [f"$2^{{{e}}}$" for e in exponents])
right.set(xlabel="scale of a block", ylabel="share of the blocks, %")
plt.show()

# %% [markdown]
# ## What rounding costs, and where
#
# The experts were trained for these codes, so encoding them again changes nothing. For errors we need a matrix that
# was not: the output projection of attention, which the release keeps in bfloat16.

# %%
values = dequantize(down, jnp.float32)
assert (mxfp4.decode(*mxfp4.encode(values)) == values).all()

plain = jnp.asarray(model.params.backbone["layers"]["swa_moe"]["attention"]["o"][0], jnp.float32)  # [out, in]
rounded = mxfp4.decode(*mxfp4.encode(plain))
blocks, errors = (np.asarray(x).reshape(plain.shape[0], -1, mxfp4.BLOCK) for x in (plain, rounded - plain))
relative = np.sqrt((errors**2).mean(-1) / (blocks**2).mean(-1))  # a number for each block
print(f"root-mean-square error over that of the weights: {np.sqrt((errors**2).sum() / (blocks**2).sum()):.1%}")

# %% [markdown]
# On the left is the error of each block, as a share of the block's own size: there is no part of the matrix that is
# much worse than others, which is what a scale for every 32 weights buys. On the right is why a block is good or bad.
# A block's largest weight, divided by its scale, lies from 4 to 8. Errors are largest where it falls halfway between
# the last two codes, 4 and 6, and where it lies far beyond 6: the OCP rule cuts it off there.

# %%
peak = np.abs(blocks).max(-1) / np.asarray(mxfp4.scale_values(mxfp4.encode(plain)[1]))
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(1, 1.4))
picture = left.imshow(100 * relative, aspect="auto", interpolation="nearest", cmap="magma")
left.set(xlabel="block of 32 inputs", ylabel="output")
figure.colorbar(picture, ax=left, label="error of a block, %")
right.scatter(peak, 100 * relative, s=4, alpha=0.5)
right.axvline(6, color="black", lw=1)
right.text(6.05, 100 * relative.max(), "cut off at 6", va="top")
right.set(xlabel="largest weight of the block over its scale", ylabel="error of a block, %", ylim=(0, None))
plt.show()

# %% [markdown]
# Each weight's error against the weight itself makes the codes visible: a sawtooth for each scale, and wider teeth for
# larger codes.

# %%
figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
edge = float(np.abs(blocks).max())
counted = axis.hist2d(blocks.ravel(), errors.ravel(), bins=(240, 90), norm=LogNorm(), cmap="viridis")
figure.colorbar(counted[3], ax=axis, label="weights")
axis.set(xlabel="weight", ylabel="error of the stored weight", xlim=(-edge, edge))
plt.show()

# %% [markdown]
# ## Training for it
#
# Rounding after training (PTQ) moves every weight to the nearest code, and errors add up at random. Quantisation-aware
# training (QAT) runs the forward pass through the rounding, `as_stored`, while gradients pass straight through it:
# weights settle where their *sum* is right, though each is rounded.
#
# The smallest example: learn a linear map of correlated inputs, for 600 steps in float32; then either round it, or go
# on for another 400 steps through the rounding (and, to be fair, without).

# %%
inner, outer, rank = 128, 64, 16
keys = jax.random.split(jax.random.key(0), 4)
mix = jax.random.normal(keys[0], (rank, inner))
x = jax.random.normal(keys[1], (2048, rank)) @ mix + 0.3 * jax.random.normal(keys[2], (2048, inner))
truth = jax.random.normal(keys[3], (outer, inner)) / np.sqrt(inner)
axes = {"w": ("expert", "embed", "expert_inner")}  # so that `as_stored` takes it for an expert's


def loss(params, stored: bool) -> jax.Array:
    w = as_stored(params, axes)["w"] if stored else params["w"]
    return jnp.mean(jnp.square(x @ (w - truth).T)) / jnp.mean(jnp.square(x @ truth.T))


def train(params, stored: bool, steps: int, rate: float):
    """The parameters after some steps of Adam at a falling rate, and the loss as it would be stored at every step."""
    rule = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        params, state = carry
        updates, state = rule.update(jax.grad(loss)(params, stored), state)
        params = optax.apply_updates(params, updates)
        return (params, state), (loss(params, False), loss(params, True))

    (params, _), seen = jax.lax.scan(step, (params, rule.init(params)), length=steps)
    return params, seen


base, seen = jax.jit(train, static_argnums=(1, 2))({"w": jnp.zeros((outer, inner))}, False, 600, 1e-2)
_, without = jax.jit(train, static_argnums=(1, 2))(base, False, 400, 2e-3)
trained, through = jax.jit(train, static_argnums=(1, 2))(base, True, 400, 2e-3)

# %% [markdown]
# The gray line is never stored; the other two are what a checkpoint would hold. Training on without the rounding does
# not help what is stored; training through it makes its error several times smaller.

# %%
figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
assert through[1][-1] < without[1][-1] / 3
first, then = np.arange(600), 600 + np.arange(400)
axis.plot(np.r_[first, then], np.r_[seen[0], without[0]], color="gray", label="float32, not stored")
axis.plot(np.r_[first, then], np.r_[seen[1], without[1]], label="rounded after training")
axis.plot(then, through[1], label="trained through the rounding")
axis.axvline(600, color="black", lw=0.8, ls=":")
axis.set(yscale="log", xlabel="step", ylabel="error of the map, share of the variance")
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# ## On the model in the package
#
# The same comparison of whole models, as recorded (`mimo-jax eval quality`): perplexity on 40 held-out texts a
# scenario, against a model trained as long in bfloat16. Neither way costs much here: most intervals include zero,
# neither is better everywhere, and what stands out is rounding after training in chat. The release's card has a
# comparison of its own, at the real size.

# %%
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
for offset, (name, label) in enumerate((("ptq", "rounded after training"), ("qat", "trained for MXFP4"))):
    results = json.loads((NANO / "results" / f"quality-{name}.json").read_text())["quality"]
    shown = [r for r in results if r["name"].startswith("perplexity")]
    change = 100 * np.array([[r["low"], r["change"], r["high"]] for r in shown])
    rows = np.arange(len(shown)) + 0.24 * (offset - 0.5)
    axis.errorbar(change[:, 1], rows, xerr=np.diff(change).T, fmt="o", capsize=3, label=label)
axis.axvline(0, color="gray", lw=0.8)
axis.set_yticks(range(len(shown)), [r["name"].removeprefix("perplexity, ") for r in shown])
axis.set(xlabel="change of perplexity against bfloat16, %, with 95 % intervals", ylim=(len(shown) - 0.5, -0.5))
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# ## Bytes
#
# A block of 32 is 16 bytes of codes and one of scale: 4.25 bits a weight. At the real size, experts in bfloat16 take
# sixteen H200s for the weights alone, in FP8 they fill eight, and in MXFP4 they leave half of eight to caches. All
# else together is small beside them.

# %%
shapes = ModelShapes.of(*PRESETS["mimo-v2.5-pro"].configs())
experts = sum(w.parameters() for w in shapes.weights if w.component == "experts")
others = sum(w.nbytes() for w in shapes.weights if w.component != "experts")
device = known_devices()["H200"]
sizes = {"bfloat16": 16, "FP8, blocks of 128 x 128": 8 + 32 / 128**2, "MXFP4": 4 + 8 / 32}
figure, axis = plt.subplots(figsize=(9, 2.6), layout="constrained")
for row, width in enumerate(sizes.values()):
    axis.barh(row, experts * width / 8e9, color="tab:blue", label="experts" if row == 0 else None)
    axis.barh(row, others / 1e9, left=experts * width / 8e9, color="tab:orange", label="all else" if row == 0 else None)
    axis.text(
        (experts * width / 8 + others) / 1e9 + 15, row, f"{(experts * width / 8 + others) / 1e9:,.0f} GB", va="center"
    )
for count in (4, 8, 16):
    axis.axvline(count * device.memory_bytes / 1e9, color="gray", lw=0.8, ls=":")
    axis.text(count * device.memory_bytes / 1e9, -0.75, f"{count} x {device.name}", ha="center", color="gray")
axis.set_yticks(range(3), sizes)
axis.set(xlabel="weights, GB", xlim=(0, 2450), ylim=(2.5, -0.5))
axis.legend(loc="lower right")
plt.show()
held = Plan(shapes, default_topology(8), device, batch=1, context=4096, verify_length=8).memory()
print(f"experts on each of 8 devices: {held.weights['experts'] / 1e9:.1f} GB of {held.capacity / 1e9:.0f}")
