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
# # Quick start
#
# The trained model in the package, text out of it, and what speculative decoding did. It has 14 million parameters in
# the layout of MiMo-V2.5-Pro-FP4-DFlash and knows only what it was trained on; a folder of the release's layout loads
# the same way.

# %%
from mimo_jax import Decoding, Generator, SamplingParams

generator = Generator.load()  # or Generator.load("DIR")
completion = generator.chat([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=64)
print(completion.text)

# %% [markdown]
# A *round* drafts a block of 8 tokens, verifies it, and keeps what the backbone agrees with plus one token of its own:
# the *accepted length* is tokens over rounds, from 1 to 8.

# %%
stats, timing = completion.stats, generator.timing
print(f"{stats.new_tokens} tokens, {stats.rounds} rounds, accepted length {stats.accepted_length:.2f}")
print(f"compiling {timing.compile:.1f} s, prefill {timing.prefill:.2f} s, decode {timing.decode:.2f} s")

# %% [markdown]
# Every round is on record: what the drafter proposed, what the backbone picked, how many drafts stood.

# %%
for done in completion.rounds[:4]:
    drafts, picks = generator.tokenizer.decode(done.drafts), generator.tokenizer.decode(done.tokens[: done.emitted])
    print(f"drafted {drafts!r}\n   kept {picks!r}: {done.accepted} drafts stood")

# %% [markdown]
# Text streams as it is decoded, and a sample depends on its seed alone: neither drafts nor the company in a batch
# change it. Plain decoding (`verify_length=1`) gives the same tokens, one a round.

# %%
settings = SamplingParams(max_new_tokens=40, temperature=1.0, top_p=0.95, seed=7)
prompt = "def add_all(numbers: list[int]) -> int:\n"
print(prompt, *generator.stream(prompt, settings), sep="")
alone = generator.generate(prompt, settings)
plain, other = generator.generate_batch([prompt, "import os\n"], settings, decoding=Decoding(verify_length=1))
assert plain.token_ids == alone.token_ids
print(
    f"{alone.stats.rounds} rounds speculatively, {plain.stats.rounds} plainly: the same {len(alone.token_ids)} tokens"
)
