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
# # A first search, from nothing to a checkpoint
#
# AutoQuant decides for every layer of a language model whether it is stored in NVFP4, FP8 or BF16,
# so that the whole checkpoint keeps a budget of bits per element (BPE) and the output distribution
# stays as close as it can to the original's. This notebook makes one such decision on the model
# that comes with AutoQuant, a trained mixture of experts of 10.9 M parameters, and looks at what
# one should look at before serving the result.
#
# **Settings are small here**, so that all of it runs in half a minute on one CPU core: 2,048 tokens
# for each probe, 6 trials and 8,192 tokens for the final figure, against 16,384, 30 and 65,536 by
# default. The intervals below are as wide as that makes them.

# %%
# %matplotlib inline
import os
import sys
import tempfile

import pandas as pd

import autoquant

os.chdir(tempfile.mkdtemp())  # where `runs` goes
pd.options.display.float_format = "{:.5g}".format

# %% [markdown]
# ## What there is to decide
#
# `autoquant plan` reads headers and no weights, also for a model on the hub. Three lines decide
# whether a budget makes sense: the *floor* (all that may be NVFP4 is), the *ceiling* (nothing is
# quantized), and the table of what stays in BF16 whatever is chosen. A budget under the floor ends
# a search before it begins; one that is close to the floor leaves little to choose.

# %%
# !{sys.executable} -m autoquant plan --budget-bpe 5.0

# %% [markdown]
# Eighteen groups in three formats are 3^18 = 387 million assignments, and the experts hold 89 %
# of what is searched: at 5.0 bits a single layer of experts in FP8 would use up more than the
# whole distance to the floor. So the room is in attention, and in which scale rule each group has
# (three rules store the same bits).
#
# ## The search

# %%
run = autoquant.search(
    budget_bpe=5.0,
    trials=6,
    calibration_tokens=2_048,
    search_tokens=2_048,
    report_tokens=8_192,
    out="runs/first",
)
run

# %% [markdown]
# ## What came out
#
# KL is KL(BF16 || quantized) in nats per token over the full vocabulary, on tokens that no step of
# the search has seen. The baselines are measured on the same tokens. `fits` says who keeps the
# budget: the recipes that are better than the search here are also larger, and those are not
# competitors but the price list of a larger budget (notebook 03).

# %%
result = run.result
run.baselines()[["name", "bpe", "kl", "stderr", "fits"]]

# %%
run.plot_frontier()

# %% [markdown]
# The picture answers the question "is this assignment on the frontier of what I could have?".
# Every small mark below is a measured assignment (on search tokens), every mark above is one that
# was confirmed on fresh tokens, with its interval. Two things to check before believing it:
#
# * the confirmed mark of the winner lies below the line between the recipes to its left and right:
#   then the assignment is worth more than blending two recipes;
# * its interval does not reach the uniform NVFP4 recipe: otherwise serve that, it is simpler.

# %%
rows = run.baselines().set_index("name")
ours, uniform = rows.loc["the winner"], rows.loc["uniform nvfp4"]
ratio = uniform.kl / ours.kl
spread = ratio * ((uniform.stderr / uniform.kl) ** 2 + (ours.stderr / ours.kl) ** 2) ** 0.5
print(
    f"uniform NVFP4 has {ratio:.2f} +- {spread:.2f} times the KL of the winner, "
    f"for {uniform.bpe - ours.bpe:+.3f} bits per element"
)
print(f"BF16 against itself (other kernels): {result['noise_floor']:.2g} nats per token")

# %% [markdown]
# The `+-` is one standard error and treats the two as independent. They are measured on the same
# tokens, and hard tokens are hard for both, so it overstates the error of the ratio. The noise
# floor is the KL that two BF16 runs show: nothing below it can be told from BF16.
#
# ## Which layer got what

# %%
run.plot_map()

# %%
groups = run.groups()
groups["format"] = groups["choice"].str.partition("/")[0]
groups.pivot_table(index="role", columns="format", values="elements", aggfunc="sum").fillna(
    0
).astype(int)

# %% [markdown]
# The map shows the decision beside its reason: a group that keeps FP8 or BF16 should be one whose
# own KL in NVFP4 is high *for its size*. A group that looks sensitive and is in NVFP4 all the same
# is one that was too large to upgrade. Notebook 02 takes this apart.
#
# ## Was the search right to stop?

# %%
finalists = pd.DataFrame(result["finalists"])
paired = pd.DataFrame(list(finalists["to_solver"]))
finalists[["stage", "name", "bpe", "search_kl", "kl", "stderr"]].join(
    paired[["low", "high"]].rename(columns={"low": "vs solver, low", "high": "high"})
)

# %%
print(f"winner: {result['winner']['stage']}: {result['winner']['name']}")
share = result["resolution"]  # None where the text has too few documents for an interval
told = f"{share:.1%} of the KL" if share is not None else "nothing, for want of documents"
print(f"differences that could be told on these tokens: above {told}")
run.plot_convergence()

# %% [markdown]
# The finalists are compared *paired*, token batch by token batch, which cancels what is hard about
# a token for every assignment. An interval that contains 0 is a tie, and a tie goes to the
# solver's own choice: a difference seen on the search tokens alone is as likely a loss on fresh
# ones. Only a row whose interval ends below 0 replaces it. Compare the columns `search_kl` and
# `kl` of one row: that is how far the choice of tokens moves a figure (by a sixth or so here),
# and the rows are much closer to each other.
#
# ## What a user of the model would notice

# %%
kl, perplexity = result["kl"], result["perplexity"]
pd.Series(
    {
        "mean KL": kl["mean"],
        "median KL": kl["median"],
        "99th percentile": kl["p99"],
        "worst token": kl["max"],
        "same most likely token": result["top1_agreement"],
        "perplexity, BF16": perplexity["bf16"],
        "perplexity, quantized": perplexity["quantized"],
    }
).to_frame("the winner")

# %%
run.plot_tokens()

# %% [markdown]
# The mean is carried by a tail: the median token is well below it, the worst one is more than ten
# times above. Perplexity moves by under a percent and would have hidden that. `report.html` quotes
# the text around the worst tokens; read it before publishing a model.
#
# ## The checkpoint

# %%
checkpoint = run.path / "checkpoint"
pd.Series({file.name: file.stat().st_size for file in sorted(checkpoint.iterdir())}).to_frame(
    "bytes"
)

# %%
# !{sys.executable} -m autoquant verify {checkpoint} --format json | head -12

# %% [markdown]
# The folder is what `vllm serve`, SGLang and TensorRT-LLM load and what `hf upload` takes: the
# model card with the table above is in its `README.md`. `verify` reads every tensor back; with
# `--source MODEL` it compares every code with the source too.
#
# ## Where to go from here
#
# The same search from a shell, which goes on in the same folder if it was interrupted:

# %%
print(result["command"])

# %% [markdown]
# For a model that is to be published leave out the token and trial counts: the defaults resolve
# differences of about 1 %. The standard error falls with the square root of the tokens, so halving
# an interval costs four times the tokens of that split; raise `--report-tokens` to compare results,
# `--search-tokens` to rank layers.
