# ---
# jupyter:
#   jupytext:
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
# A checkpoint in the release's layout, text out of it, and what speculative decoding did. The checkpoint is synthetic:
# its weights are random, so its text means nothing and its drafter agrees with its backbone only by accident.

# %%
import tempfile
from pathlib import Path

from mimo_jax import Decoding, Generator, SamplingParams
from mimo_jax.synthesize import synthesize

folder = Path(tempfile.mkdtemp()) / "tiny"
synthesize("tiny", folder, seed=0)

# %% [markdown]
# Three lines: load, generate, look.

# %%
generator = Generator.load(folder)
completion = generator.generate("The capital of France is", max_new_tokens=32, ignore_eos=True)
print(repr(completion.text), completion.stats)

# %% [markdown]
# Text streams as it is decoded, and a sample depends on its seed alone: neither drafts nor batch change it.

# %%
settings = SamplingParams(max_new_tokens=24, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
print("".join(generator.stream("Once upon a time", settings)))
alone = generator.generate("Once upon a time", settings)
plain, other = generator.generate_batch(["Once upon a time", "Two roads"], settings, decoding=Decoding(verify_length=1))
assert plain.token_ids == alone.token_ids

# %% [markdown]
# Every round: what the drafter proposed, what the backbone picked, and how many of the drafts stood.

# %%
for done in completion.rounds[:4]:
    print(done.drafts, done.tokens, f"accepted {done.accepted}, emitted {done.emitted}")
