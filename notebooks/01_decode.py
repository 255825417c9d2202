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
# # One speculative round, opened up
#
# A decoder writes one token a pass, and a pass costs a read of the weights however few tokens it writes. Speculative
# decoding gives a pass more to do: a small *drafter* guesses the next 7 tokens, and the *backbone* checks all of them
# at once. Here we look inside: what is drafted, what the backbone thinks of it, what stands, and what it is worth.
#
# The model is the small trained one in the package. `Generator.load("DIR")` takes the same cells to another.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import treescope
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from mimo_jax import Decoding, Generator, SamplingParams, Session
from mimo_jax.evaluation.scenarios import prompts
from mimo_jax.speculative import DecodeState, ModelParams, Models

generator = Generator.load(progress=False)
model, tokenizer = generator.model, generator.tokenizer
asked = {name: prompts(tokenizer, name)[0] for name in ("web", "math", "code")}
print(tokenizer.decode(asked["code"]))

# %% [markdown]
# ## The state before a round
#
# A `Session` holds one batch on the device. After the prompt it has committed keys and values up to some length, and
# an *anchor*: the token that is known to stand next, but is in no cache yet. The picture is one head's keys in the
# ring of a sliding-window layer: slots that the prompt has not reached are still zero.

# %%
settings = SamplingParams(max_new_tokens=120)
session = Session(model, [asked["code"]], [settings], Decoding(rounds_per_dispatch=1))
session.prefill()
print(f"{int(session.state.cache.lengths[0])} positions committed")
print(f"the anchor is {tokenizer.decode(session.state.anchor.tolist(), skip_special=False)!r}")
treescope.render_array(
    session.state.cache.kv["swa"].k[0, 0, :, 0], axis_labels={0: "ring slots", 1: "a key's dimensions"}
)

# %% [markdown]
# ## Draft and verify, by hand
#
# The drafter's block is the anchor's embedding followed by seven mask vectors; *one* pass fills them all, reading the
# backbone's features of earlier positions from its ring. The backbone then runs over the eight rows causally, and row
# r says what should follow it. Neither pass writes anything: what does not stand is simply never stored.


# %%
@partial(jax.jit, static_argnames="models")
def look(models: Models, params: ModelParams, state: DecodeState) -> tuple[jax.Array, jax.Array]:
    """Drafts [batch, 7], and the backbone's probabilities [batch, 8, vocab] of what follows each row of the block."""
    backbone, drafter = models.backbone.bind(params.backbone), models.bind_drafter(params)
    filled = drafter(backbone.embed(state.anchor), state.ring, state.cache.lengths)
    drafts = backbone.head(filled[:, 1:]).argmax(-1).astype(jnp.int32)
    block = jnp.concatenate([state.anchor[:, None], drafts], axis=1)
    output = backbone(block, state.cache, models.capture)
    return drafts, jax.nn.softmax(backbone.logits(output.hidden))


drafts, probabilities = look(model.models, model.params, session.state)
picks = probabilities.argmax(-1)
accepted = int(np.cumprod(np.asarray(drafts == picks[:, :-1]), axis=1).sum())
print("drafted ", [tokenizer.decode([t]) for t in drafts[0].tolist()])
print("backbone", [tokenizer.decode([t]) for t in picks[0].tolist()])
print(f"{accepted} drafts stand; the backbone's next pick comes free: {accepted + 1} tokens")

# %% [markdown]
# That is all there is to greedy acceptance: the longest prefix of the drafts that equals the backbone's own picks. The
# program that decodes does the same, and commits:

# %%
(done,) = session.step().rounds.drafts
assert (done == np.asarray(drafts)).all()
print(f"{int(session.state.cache.lengths[0])} positions committed")

# %% [markdown]
# ## Twelve rounds
#
# The picture has a round a row. Each cell is a draft, shaded by the probability that the *backbone* gives it there.
# Drafts with green frames stand. The red one is where the backbone would rather have had something else; drafts after
# it were verified for nothing, since they follow a token that will not be there. On the right stands the backbone's
# own token, the *bonus*, which is the next row's anchor. Look for where rounds end: at a name that is new, or a
# number.

# %%
looked = []
while len(looked) < 12 and session.active.any():
    now, (drafts, chances) = jax.device_get((session.state.anchor, look(model.models, model.params, session.state)))
    rounds = session.step().rounds
    accepted = int(rounds.accepted[0, 0])
    looked.append((int(now[0]), drafts[0], chances[0], accepted, int(rounds.tokens[0, 0, accepted])))


def shown(token: int) -> str:
    return tokenizer.decode([token], skip_special=False).replace("\n", "↵").replace(" ", "·")


blues = LinearSegmentedColormap.from_list("pale blues", ["white", "#8ec5ee"])
figure, axis = plt.subplots(figsize=(11, 5.5), layout="constrained")
for y, (now, drafted, chances, accepted, bonus) in enumerate(looked):
    axis.text(0, y, shown(now), ha="center", va="center", weight="bold")
    for x, token in enumerate(drafted.tolist(), start=1):
        edge = "green" if x <= accepted else "crimson" if x == accepted + 1 else "lightgray"
        width = 1 if edge == "lightgray" else 2
        cell = Rectangle(
            (x - 0.45, y - 0.4), 0.9, 0.8, facecolor=blues(chances[x - 1, token]), edgecolor=edge, lw=width
        )
        axis.add_patch(cell)
        axis.text(x, y, shown(token), ha="center", va="center", color="dimgray" if x > accepted + 1 else "black")
    axis.text(8.2, y, shown(bonus), ha="center", va="center", weight="bold", color="tab:orange")
    axis.text(9.1, y, f"{accepted + 1}", ha="center", va="center")
axis.set(xlim=(-0.7, 9.5), ylim=(len(looked) - 0.4, -0.6), ylabel="round", yticks=range(len(looked)))
axis.set_xticks([0, *range(1, 8), 8.2, 9.1], ["anchor", *(f"draft {i}" for i in range(1, 8)), "bonus", "tokens"])
axis.xaxis.tick_top()
axis.tick_params(length=0)
axis.spines[:].set_visible(False)
figure.colorbar(plt.cm.ScalarMappable(cmap=blues), ax=axis, label="the backbone's probability of the draft", shrink=0.6)
plt.show()

# %% [markdown]
# ## The loop on the device
#
# `session.step()` above ran one round and came back. `decode` runs up to N rounds in one `lax.while_loop`, and only
# token ids and counts come back to the host. Below, the same three prompts are decoded plainly (one row a pass), with
# a round a dispatch, and with 8 rounds a dispatch. All give the same tokens.
#
# The bars are tokens a second, the best of six runs; look for the prompt on which speculation does not pay. On a CPU,
# eight rows cost about three times one, so it pays from an accepted length of about 3 on. On a GPU what counts is what
# must be read: `04_acceptance` has what rows cost at the real size.

# %%
ways = {
    "plain": Decoding(verify_length=1),
    "speculative, 1 round a dispatch": Decoding(rounds_per_dispatch=1),
    "speculative, 8 rounds a dispatch": Decoding(rounds_per_dispatch=8),
}
speeds, lengths = {way: [] for way in ways}, []
for ids in asked.values():
    answers = {}
    for way, decoding in ways.items():
        runs = []
        for _ in range(6):
            answers[way] = generator.generate(ids, settings, decoding=decoding)
            runs.append(answers[way].stats.round_tokens / generator.timing.decode)
        speeds[way].append(max(runs))
    assert len({tuple(a.token_ids) for a in answers.values()}) == 1
    lengths.append(answers["speculative, 8 rounds a dispatch"].stats.accepted_length)

figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
for i, (way, speed) in enumerate(speeds.items()):
    bars = axis.bar(np.arange(len(asked)) + 0.27 * (i - 1), speed, 0.25, label=way)
    axis.bar_label(bars, fmt="{:.0f}", fontsize="small")
axis.set_xticks(range(len(asked)), [f"{n}\naccepted length {a:.1f}" for n, a in zip(asked, lengths, strict=True)])
axis.set_ylabel(f"tokens/s, batch 1, {jax.default_backend().upper()}")
axis.set_ylim(0, 1.25 * max(max(s) for s in speeds.values()))
axis.legend(ncols=3, loc="upper center", fontsize="small")
plt.show()
