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
# # Windows and caches
#
# Of MiMo-V2.5-Pro's 70 layers only ten see the whole context. The others, and all of the drafter's, see a window. Here
# is who sees what, what must be remembered for it, and how a round that goes wrong is undone.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from mimo_jax import Generator, SamplingParams, Topology
from mimo_jax.cache import RingKV, backbone_cache, drafter_ring, ring_slots
from mimo_jax.devices import known_devices
from mimo_jax.evaluation.scenarios import prompts
from mimo_jax.plan import ModelShapes, Plan
from mimo_jax.presets import PRESETS

config, drafter = PRESETS["mimo-v2.5-pro"].configs()

# %% [markdown]
# ## Which layer is of which kind
#
# Blue layers read every earlier position, orange ones a window of 128 before their own. The drafter is a model of its
# own: five layers with a window of 1024, whose context is made of the backbone's residual stream after the five marked
# layers.

# %%
figure, axis = plt.subplots(figsize=(11, 1.6), layout="constrained")
colours = {"full": "tab:blue", "swa": "tab:orange"}
for i, layer in enumerate(config.layers):
    axis.bar(i, 1, width=0.85, color=colours[layer.attention])
for i in drafter.target_layer_ids:
    axis.plot(i, 1.25, "v", color="tab:green", clip_on=False)
handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in colours.values()]
handles.append(plt.Line2D([], [], marker="v", color="tab:green", ls=""))
figure.legend(
    handles, ["full attention", "window", "read by the drafter"], loc="outside upper center", ncols=3, frameon=False
)
axis.set(xlabel="layer of the backbone", xlim=(-0.6, len(config.layers) - 0.4), ylim=(0, 1.5), yticks=[])
axis.spines[["top", "left", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Which keys a row sees
#
# Measured, not drawn from the rule. Attention is linear in the values, so if all values but one position's are zero,
# the rows that put out something are those that see it. This runs the attention of the small trained model in the
# package for a round: 300 positions are committed, and a block of 8 rows follows. Its drafter's window is 256, else it
# is as the release's.

# %%
generator = Generator.load(progress=False)
model = generator.model
backbone, small_drafter = model.models.backbone.bind(model.params.backbone), model.models.bind_drafter(model.params)
committed, block = 300, 8
caches = backbone_cache(model.config, 1, committed + block, block, "float32").kv
caches["drafter"] = drafter_ring(model.drafter_config, 1, committed + block, "float32")
attentions = {
    "full": (backbone.layers["full_moe"].attention, True),
    "swa": (backbone.layers["swa_moe"].attention, True),
    "drafter": (small_drafter.attention, model.drafter_config.block_causal),
}


@partial(jax.jit, static_argnums=0)
def seen(kind: str) -> jax.Array:
    """[rows, positions]: whether a row of the block sees a position."""
    (attention, causal), cache, total = attentions[kind], caches[kind], committed + block
    sizes, layers, lengths = attention.config, cache.k.shape[0], jnp.array([committed])
    keys = jax.random.normal(jax.random.key(0), (1, total, sizes.kv_heads, sizes.qk_dim))
    queries = jax.random.normal(jax.random.key(1), (1, block, sizes.heads, sizes.qk_dim))

    def rows_that_see(position: jax.Array) -> jax.Array:
        values = jnp.zeros((1, total, sizes.kv_heads, sizes.v_dim)).at[:, position].set(1.0)
        before = [jnp.repeat(x[None, :, :committed], layers, axis=0) for x in (keys, values)]
        held = cache.commit(before, jnp.array([0]), lengths)
        own = keys[:, committed:], values[:, committed:]
        return jnp.abs(attention.attend(queries, own, 0, held, 0, lengths, causal)[0]).max(-1) > 0

    return jax.lax.map(rows_that_see, jnp.arange(total)).T


masks = {kind: np.asarray(seen(kind)) for kind in attentions}
for kind, (attention, _) in attentions.items():
    window = attention.config.visible_keys
    assert masks[kind][0, :committed].sum() == (committed if window is None else window - 1)

# %% [markdown]
# A row of a picture is a row of the block, a column a position; dark is a committed key, light one of the block
# itself. On the right is the same, close to the block. Windows move on by one a row, which makes their slanted edge.
# Within the block, backbone rows are *causal*: a triangle. The drafter's rows all see each other: it fills them in one
# pass, together.

# %%
titles = {"full": "full attention", "swa": "window of 128", "drafter": "drafter"}
figure, axes = plt.subplots(3, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(3, 1), sharex="col")
palette = ListedColormap(["whitesmoke", "tab:blue", "lightskyblue"])
own = np.arange(committed + block) >= committed
for (whole, close), (kind, title) in zip(axes, titles.items(), strict=True):
    shown = masks[kind] * (1 + own)
    for axis, first in ((whole, 0), (close, committed - 16)):
        extent = (first - 0.5, committed + block - 0.5, block - 0.5, -0.5)
        axis.imshow(
            shown[:, first:], cmap=palette, vmin=0, vmax=2, aspect="auto", interpolation="nearest", extent=extent
        )
        axis.axvline(committed - 0.5, color="black", lw=0.8)
    close.set_xticks(np.arange(committed - 15.5, committed + block), minor=True)
    close.set_yticks(np.arange(0.5, block), minor=True)
    close.grid(which="minor", color="white", lw=0.8)
    close.tick_params(which="minor", length=0)
    whole.set(ylabel="row", yticks=(0, 7))
    close.set_yticks((0, 7))
    whole.set_title(title, fontsize="medium")
    close.set_title(f"{title}, the end", fontsize="medium")
for axis in axes[-1]:
    axis.set_xlabel("position")
plt.show()

# %% [markdown]
# ## What must be remembered
#
# Full-attention layers keep keys and values of every position, in *pages* that a sequence takes as it grows. A window
# never needs more than its own length, so those layers keep a *ring*. Bytes of one sequence, from shapes alone, up to
# the model's million positions: rings stop growing almost at once, and at 1M a sequence takes a seventh of what
# seventy full layers would.

# %%
shapes, device = ModelShapes.of(config, drafter), known_devices()["H200"]
contexts = [1 << i for i in range(6, 21)]
held = [Plan(shapes, Topology(), device, batch=1, context=n, verify_length=8).caches() for n in contexts]
full = sum(layer.attention == "full" for layer in config.layers)
everything = [h["pages"] * len(config.layers) / full for h in held]

figure, axis = plt.subplots(figsize=(8.5, 4.4), layout="constrained")
axis.plot(
    contexts, np.array(everything) / 1e9, color="gray", ls="--", label=f"if all {len(config.layers)} layers were full"
)
for name, colour in (("pages", "tab:blue"), ("SWA rings", "tab:orange"), ("drafter ring", "tab:green")):
    label = {
        "pages": f"pages of {full} full layers",
        "SWA rings": f"rings of {len(config.layers) - full} windowed layers",
    }
    axis.plot(
        contexts, [h[name] / 1e9 for h in held], color=colour, label=label.get(name, "ring of the drafter's 5 layers")
    )
axis.set_xscale("log", base=2)
axis.set_yscale("log")
ticks = contexts[::2]
axis.set_xticks(ticks, [f"{n >> 20}M" if n >> 20 else f"{n >> 10}K" if n >> 10 else str(n) for n in ticks])
axis.set(xlabel="context, positions", ylabel="bfloat16 keys and values of one sequence, GB")
axis.grid(alpha=0.3)
axis.legend()
plt.show()
rings = held[-1]["SWA rings"] + held[-1]["drafter ring"]
print(f"at 1M: pages {held[-1]['pages'] / 1e9:.1f} GB, rings {rings / 1e9:.3f} GB")

# %% [markdown]
# ## Rings and roll-back
#
# A ring keeps position c in slot c mod R, so which position a slot holds follows from the length alone. A round's rows
# are *returned* by the backbone, not stored; when it is known how many stand, `commit` stores exactly those. So
# nothing ever has to be rolled back: what was rejected was never there. To watch it, here are the rounds of a real
# answer, played through a ring whose "keys" are just their positions.

# %%
answer = generator.generate(prompts(generator.tokenizer, "code")[0], SamplingParams(max_new_tokens=160))
accepted = [done.emitted for done in answer.rounds]
visible = model.config.swa.visible_keys
slots = ring_slots(visible, block, 4096)
start = len(answer.prompt_ids)


def rows(first: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values [1, 1, count, 1, 1] that tell their position."""
    at = (first + jnp.arange(count, dtype=jnp.float32)).reshape(1, 1, count, 1, 1)
    return at, at


nothing = jnp.full((1, 1, slots, 1, 1), -1.0)
ring = RingKV(nothing, nothing).commit(rows(0, start), jnp.array([0]), jnp.array([start]))
length, holds, lengths = start, [], []
for count in accepted:
    ring = ring.commit(rows(length, block), jnp.array([length]), jnp.array([count]))  # eight rows come, `count` stand
    length += count
    holds.append(np.asarray(ring.k).ravel())
    lengths.append(length)

for positions, length in zip(holds, lengths, strict=True):
    window = np.arange(max(0, length - visible + 1), length)
    assert (positions[window % slots] == window).all()  # all that the next row may see is there

# %% [markdown]
# On the left, the rounds as stairs: a row of eight cells is what was verified, green stood and red was dropped; the
# next round takes the place of the red. On the right, what the ring's slots hold after each round, by age: the bright
# edge is where the newest position stands, going around; the darkest slots come next, and their eight oldest are
# beyond any window already.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
some = 12
for i, (count, end) in enumerate(zip(accepted[:some], lengths[:some], strict=True)):
    for j in range(block):
        colour = "tab:green" if j < count else "lightcoral"
        left.add_patch(plt.Rectangle((end - count + j, i + 0.1), 1, 0.8, facecolor=colour, edgecolor="white"))
left.set(xlim=(start - 1, lengths[some - 1] + block), ylim=(some, 0), xlabel="position", ylabel="round")
left.set_yticks(np.arange(some) + 0.5, range(some))
left.grid(alpha=0.3, axis="x")
age = np.array(lengths)[:, None] - 1 - np.array(holds)  # [rounds, slots]
age = np.where(np.array(holds) < 0, np.nan, age)
picture = right.imshow(age.T, aspect="auto", cmap="viridis_r", interpolation="nearest", origin="lower")
right.set(xlabel="round", ylabel=f"slot of the ring ({slots} = {visible} visible + {block} rows - 1)")
figure.colorbar(picture, ax=right, label="age of what a slot holds, positions")
plt.show()
