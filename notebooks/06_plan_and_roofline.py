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
# # What fits, and what a round costs at least
#
# MiMo-V2.5-Pro on 8 and on 16 H200s, from shapes and data sheets alone: nothing here has been measured. `mimo-jax
# plan` prints the same for any preset and device. *Floors* are the least time that bytes, FLOPs or links allow; real
# rounds take longer.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np

from mimo_jax.devices import known_devices
from mimo_jax.floors import expected_distinct, expected_largest, floor
from mimo_jax.plan import ModelShapes, Plan, default_topology
from mimo_jax.plan_report import BATCHES, scaling
from mimo_jax.presets import PRESETS

config, drafter = PRESETS["mimo-v2.5-pro"].configs()
shapes, device = ModelShapes.of(config, drafter), known_devices()["H200"]
counts = (8, 16)
plans = {n: Plan(shapes, default_topology(n), device, batch=16, context=131072, verify_length=8) for n in counts}
for n, plan in plans.items():
    print(f"{n} x {device.name}: mesh {plan.topology.axes}, {plan.topology.width('expert')} parts of the experts")
print(f"{device.name}: {device.memory_bytes / 1e9:.0f} GB, {device.hbm_bytes_per_s / 1e12:.1f} TB/s,", end=" ")
print(
    f"{device.bf16_flops / 1e12:.0f} TFLOP/s, {device.link} {device.link_bytes_per_s / 1e9:.0f} GB/s ({device.source})"
)

# %% [markdown]
# ## Memory
#
# One device's memory, with sixteen sequences of 128K. Experts halve with twice the devices. Attention does not: each
# data-parallel group of eight has all of it. Pages halve, since each group has half of the sequences.

# %%
parts = []
for plan in plans.values():
    memory = plan.memory()
    others = sum(memory.weights.values()) - memory.weights["experts"] - memory.weights["attention"]
    rings = sum(memory.caches.values()) - memory.caches["pages"]
    parts.append(
        {
            "experts": memory.weights["experts"],
            "attention": memory.weights["attention"],
            "other weights, drafter": others + memory.drafter,
            "pages": memory.caches["pages"],
            "rings": rings,
            "workspace (estimate)": sum(memory.workspace.values()),
        }
    )
figure, axis = plt.subplots(figsize=(10, 2.8), layout="constrained")
left = np.zeros(len(parts))
for name in parts[0]:
    width = np.array([p[name] for p in parts]) / 1e9
    axis.barh(range(len(parts)), width, left=left, label=name)
    for row, (start, size) in enumerate(zip(left, width, strict=True)):
        if size > 3:
            axis.text(start + size / 2, row, f"{size:.0f}", ha="center", va="center", color="white")
    left += width
axis.axvline(device.memory_bytes / 1e9, color="black", lw=1)
axis.set_yticks(range(len(parts)), [f"{n} devices" for n in plans])
axis.set(
    xlabel=f"GB of each {device.name}; the line is all it has",
    ylim=(1.5, -0.5),
    xlim=(0, device.memory_bytes / 1e9 + 4),
)
figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize="small")
plt.show()

# %% [markdown]
# ## Batch against context
#
# How many sequences of which length fit beside the weights. Below some thousand positions rings, logits and
# activations count; above, pages alone do, and the lines fall as one over the context. At a million positions, eight
# devices hold ten sequences.

# %%
contexts = [1 << i for i in range(12, 21)]
largest = {n: [replace(p, batch=1, context=c).largest_batch() for c in contexts] for n, p in plans.items()}
figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
for n, batch in largest.items():
    axis.plot(contexts, batch, marker="o", label=f"{n} x {device.name}")
    for c, most in zip(contexts, batch, strict=True):
        axis.annotate(
            f"{most:,}", (c, most), (0, 6 if n == 16 else -14), textcoords="offset points", ha="center", fontsize=8
        )
axis.set_xscale("log", base=2)
axis.set_yscale("log")
axis.set_xticks(contexts, [f"{c >> 10}K" if c < 1 << 20 else "1M" for c in contexts])
axis.set(xlabel="context, positions", ylabel="sequences that fit", ylim=(5, 12_000))
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# ## The roofs of a round
#
# A round of eight rows at a context of 32K, against the batch. Of three roofs, the highest is the floor. At small
# batches that is reading from HBM: at batch 1 a round reads the attention of all layers and the experts that eight
# rows reach; as the batch grows it reaches all of them, and then the line is flat until keys and values of many
# sequences weigh in. At large ones it is FLOPs among eight devices, whose NVLink is fast, and links among sixteen,
# which span two servers.

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True, layout="constrained")
for axis, (n, plan) in zip(axes, plans.items(), strict=True):
    floors = [floor(replace(plan, batch=b, context=32768)) for b in BATCHES]
    for name, roof in (
        ("HBM bandwidth", [f.bandwidth_seconds for f in floors]),
        ("FLOPs", [f.flops_seconds for f in floors]),
        ("interconnect", [f.interconnect_seconds for f in floors]),
    ):
        axis.plot(BATCHES, 1e3 * np.array(roof), marker="o", ms=3, label=name)
    axis.plot(BATCHES, [1e3 * f.seconds for f in floors], color="black", lw=5, alpha=0.15, label="floor")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(BATCHES, BATCHES)
    axis.set(xlabel="sequences in the batch", title=f"{n} x {device.name}")
    axis.grid(alpha=0.3)
axes[0].set_ylabel("a round of 8 rows, ms")
axes[0].legend()
plt.show()

# %% [markdown]
# ## What is read
#
# The same round's bytes by what they are, on 8 devices. Look at batch 1, where speculation lives: experts, then
# attention. The LM head and the drafter are small change; pages are what long contexts and large batches cost.

# %%
reads = [floor(replace(plans[8], batch=b, context=32768)).bytes_read for b in BATCHES]
order = ("experts", "attention", "caches", "router", "LM head", "drafter")
rest = [sum(v for k, v in r.items() if k not in order) for r in reads]
stack = [[r[name] / 1e9 for r in reads] for name in order] + [[v / 1e9 for v in rest]]
figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
bottom = np.zeros(len(BATCHES))
for name, values in zip((*order, "dense MLPs, norms"), stack, strict=True):
    axis.bar(range(len(BATCHES)), values, bottom=bottom, label=name)
    bottom += values
axis.set_xticks(range(len(BATCHES)), BATCHES)
axis.set(xlabel="sequences in the batch", ylabel=f"read by one of 8 {device.name} in a round, GB")
axis.grid(alpha=0.3, axis="y")
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## Whole experts or slices
#
# Experts can lie whole, some on each device, or every one of them sliced over all. Slices share each expert's work
# evenly, while with whole experts a layer waits for the device that happens to have most to do. On the left, how
# uneven that is: experts that rows reach on the busiest of the devices over the mean, if routing is even. It is bad
# luck among few rows, and vanishes among many.
#
# On the right is what it costs: the floor with whole experts over that with slices. Below the dotted line whole
# experts cost at most 5 % more, and the legend says from which batch on. Where lines fall far below 1, links bind:
# with whole experts a row travels only to devices that have its experts, with slices every device works on every row
# and all must add up. The release's launch (`--ep-size 16`) has whole ones.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
experts, top_k = config.moe.experts, config.moe.top_k
for entry in scaling(replace(plans[8], batch=1, context=32768)):
    n = entry["devices"]
    reached = np.array([expected_distinct(experts, top_k, 8 * b) for b in BATCHES])
    most = np.array([expected_largest(n, experts // n, r / experts) for r in reached])
    left.plot(BATCHES, most / (reached / n), marker="o", ms=4, label=f"{n} devices")
    ratio = [w["floor_seconds"] / s["floor_seconds"] for w, s in zip(entry["whole"], entry["sliced"], strict=True)]
    right.plot(BATCHES, ratio, marker="o", ms=4, label=f"{n} devices: from batch {entry['crossover']}")
right.axhline(1.05, color="black", lw=1, ls=":")
left.set_ylabel("experts of the busiest device over the mean")
right.set_ylabel("floor with whole experts over that with slices")
for axis in (left, right):
    axis.set_xscale("log", base=2)
    axis.set_xticks(BATCHES, BATCHES)
    axis.set_xlabel("sequences in the batch, 8 rows each")
    axis.grid(alpha=0.3)
    axis.legend()
plt.show()
