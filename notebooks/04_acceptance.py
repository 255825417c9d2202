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
# # Accepted length, and what it is worth
#
# The *accepted length* of a round is how many tokens it gives: 1 (no draft stood) to 8 (all did, and the backbone's
# own token comes on top). Here is how it depends on what is written and on the position in the block, and what it is
# worth in time.

# %%
import json

import matplotlib.pyplot as plt
import numpy as np

from mimo_jax import Generator, SamplingParams
from mimo_jax.devices import known_devices
from mimo_jax.evaluation.acceptance import RELEASE_CARD
from mimo_jax.evaluation.scenarios import SCENARIOS, prompts
from mimo_jax.floors import floor
from mimo_jax.plan import ModelShapes, Plan, default_topology
from mimo_jax.presets import NANO, PRESETS

recorded = json.loads((NANO / "results" / "acceptance.json").read_text())["acceptance"]
benchmarks = dict(zip(SCENARIOS, ("WebDev", "Math500", "HumanEval", "MT-Bench", "SWE-Bench"), strict=True))

# %% [markdown]
# ## As recorded
#
# The small model in the package, on 22 frozen prompts a scenario (`mimo-jax eval acceptance`). The hatched bars are
# **not ours**: they are what the release's card gives for MiMo-V2.5-Pro on the benchmarks that the scenarios are
# modelled on. A model of 14 million parameters is another model; what the two have in common is the order, web pages
# first and conversation last.
#
# On the right, a draft can stand only if all before it do, so the lines fall. Look at how: in web pages they hardly do
# after the first position (when a line of markup is right, all of it is), in mathematics half are gone by the fourth.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=(1.3, 1))
for i, (temperature, label) in enumerate(((0.0, "greedy"), (1.0, "temperature 1"))):
    bars = [r["accepted_length"] for r in recorded if r["temperature"] == temperature]
    left.bar_label(left.bar(np.arange(5) + 0.27 * i, bars, 0.25, label=label), fmt="{:.1f}", fontsize="small")
theirs = [RELEASE_CARD[name] for name in SCENARIOS]
card = left.bar(
    np.arange(5) + 0.54, theirs, 0.25, color="white", edgecolor="gray", hatch="//", label="the release's card"
)
left.bar_label(card, fmt="{:.2f}", fontsize="small")
left.set_xticks(np.arange(5) + 0.27, [f"{name}\n({benchmarks[name]})" for name in SCENARIOS])
left.set(ylabel="accepted length, tokens a round", ylim=(0, 8.5))
left.legend(ncols=3, loc="upper center", fontsize="small")
for r in recorded[:5]:
    right.plot(range(1, 8), [100 * share for share in r["per_position"]], marker="o", label=r["scenario"])
right.set(xlabel="position of the draft in the block", ylabel="rounds in which it stood, %, greedy", ylim=(0, 100))
right.grid(alpha=0.3)
right.legend()
plt.show()

# %% [markdown]
# ## Live
#
# Four prompts of each scenario, as one batch. The mean hides most: the picture shows how often a round gives 1, 2, ...
# 8 tokens. Rounds tend to be all or little, since text is either clear for a while or turns on a token.

# %%
generator = Generator.load(progress=False)
asked = [ids for name in SCENARIOS for ids in prompts(generator.tokenizer, name)[:4]]
answers = generator.generate_batch(asked, SamplingParams(max_new_tokens=160))
gave = np.zeros((5, 8))
for i, answer in enumerate(answers):
    for done in answer.rounds:
        gave[i // 4, done.accepted] += 1
share = 100 * gave / gave.sum(axis=1, keepdims=True)

figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
picture = axis.imshow(share, cmap="Blues", vmin=0, aspect="auto")
for (y, x), value in np.ndenumerate(share):
    axis.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value > 0.6 * share.max() else "black")
lengths = share @ np.arange(1, 9) / 100
axis.set_yticks(range(5), [f"{name} (mean {mean:.1f})" for name, mean in zip(SCENARIOS, lengths, strict=True)])
axis.set_xticks(range(8), range(1, 9))
axis.set_xlabel("tokens of a round")
figure.colorbar(picture, ax=axis, label="share of the rounds, %")
plt.show()

# %% [markdown]
# ## A shorter block
#
# The drafter always fills eight rows, but fewer may be verified. If s(i) is the share of rounds in which draft i
# stands, verifying v rows gives 1 + s(1) + ... + s(v - 1) tokens a round. The card has no shares by position, only the
# sum. To get on we assume that a draft stands with the same chance, given that those before it did, and solve for that
# chance. How wrong is that? For the small model both are known: dots are its shares, lines the assumption with the
# same sum. It gives short blocks too much, most in conversation, where a round that gets past its first drafts gets
# far.


# %%
def chance(length: float, block: int = 8) -> float:
    """The chance of each draft, given those before it, at which a block has this accepted length."""
    grid = np.linspace(0, 1, 100_001)
    return float(grid[np.searchsorted(sum(grid**i for i in range(block)), length)])


verified = np.arange(1, 9)
figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
for r in recorded[:5]:
    known = 1 + np.concatenate([[0], np.cumsum(r["per_position"])])
    (dots,) = axis.plot(verified, known, "o", label=r["scenario"])
    assumed = np.cumsum(chance(known[-1]) ** np.arange(8))
    axis.plot(verified, assumed, color=dots.get_color(), lw=1)
axis.set(xlabel="rows verified", ylabel="tokens a round", xticks=verified)
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# ## What it costs
#
# The floor of a round of MiMo-V2.5-Pro on 8 H200s, by `mimo_jax.floors`: the least time in which bytes can be read,
# FLOPs done and rows sent. Speculation gains the tokens of a round, and pays the ratio of the floors. At batch 1,
# eight rows reach more experts than one, and each must be read; at a large batch nearly all experts are read anyway
# and rows are cheap, until there are so many that FLOPs bind.

# %%
shapes = ModelShapes.of(*PRESETS["mimo-v2.5-pro"].configs())
batches = [1 << i for i in range(10)]


def seconds(batch: int, rows: int) -> float:
    """The floor of a round at a context of 8192."""
    return floor(Plan(shapes, default_topology(8), known_devices()["H200"], batch, 8192, rows)).seconds


cost = np.array([[seconds(batch, rows) for batch in batches] for rows in verified])  # [rows, batches]
figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
for rows in (2, 4, 8):
    axis.plot(batches, cost[rows - 1] / cost[0], marker="o", label=f"{rows} rows verified")
axis.axhline(1, color="gray", lw=0.8)
axis.set_xscale("log", base=2)
axis.set_xticks(batches, batches)
axis.set(xlabel="sequences in the batch", ylabel="floor of a round over that of a plain step", ylim=(0, None))
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# ## What it is worth
#
# Both together: tokens of a round over what it costs, against plain decoding. Accepted lengths are **the card's**, of
# its best, middle and worst benchmark; costs are floors, so this is the gain on a perfect machine, not a forecast.
# Dots are the best number of rows for a batch, with the gain there; where cells are red, speculation costs more than
# it gives. Look at small batches in conversation: verifying all eight rows gains nothing there, three rows do. Routing
# is taken as even, which is hard on small batches: rows of one sequence share experts, and read fewer than this.

# %%
named = {"web": "WebDev", "code": "HumanEval", "chat": "MT-Bench"}
gains = {n: np.cumsum(chance(RELEASE_CARD[n]) ** np.arange(8))[:, None] * cost[0] / cost for n in named}
figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True, layout="constrained")
most = max(gain.max() for gain in gains.values())
colours = plt.get_cmap("Blues").with_extremes(under="lightcoral")
for axis, (name, gain) in zip(axes, gains.items(), strict=True):
    picture = axis.imshow(gain, origin="lower", aspect="auto", cmap=colours, vmin=0.999, vmax=most)
    for x, y in enumerate(gain.argmax(axis=0)):
        ink = "white" if gain[y, x] > 0.7 * most else "black"
        axis.plot(x, y, "o", color=ink, ms=4)
        axis.text(x, y - 0.25, f"{gain[y, x]:.1f}", ha="center", va="top", color=ink)
    axis.set_xticks(range(len(batches)), batches)
    axis.set_yticks(range(8), verified)
    axis.set_title(f"{named[name]}: the card's {RELEASE_CARD[name]:.2f} at 8 rows", fontsize="medium")
    axis.set_xlabel("sequences in the batch")
axes[0].set_ylabel("rows verified")
figure.colorbar(picture, ax=axes, label="tokens/s over plain decoding's, by floors", extend="min")
plt.show()
