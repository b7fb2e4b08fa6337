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
# # The frontier: choosing a budget
#
# A budget is a decision about money and quality, and one search answers it for one budget only.
# This notebook searches five budgets of the bundled model from **one** set of probes (`autoquant
# search --budget-bpe 4.8,4.9,5,5.5,6` does the same), and reads off where another bit stops paying.
#
# **Settings are small here**: 1,024 tokens for probes and trials, 4 trials a budget and 4,096
# tokens for the reported KL, against 16,384, 30 and 65,536 by default. The budgets share their
# report tokens, so the *order* of neighbouring budgets is firmer than the bars, which treat them as
# independent.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import autoquant

folder = Path(tempfile.mkdtemp())
pd.options.display.float_format = "{:.4g}".format
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %%
budgets = (4.8, 4.9, 5.0, 5.5, 6.0)
runs = autoquant.search_budgets(
    budgets_bpe=budgets,
    trials=4,
    calibration_tokens=1_024,
    search_tokens=1_024,
    report_tokens=4_096,
    sequence_length=128,
    mlflow=False,
    out=folder / "budgets",
)

# %% [markdown]
# ## What each budget buys

# %%
table = pd.DataFrame(
    {
        run.result["budget_bpe"]: {
            "bpe": run.result["bpe"]["checkpoint"],
            "MB": run.result["checkpoint_bytes"] / 1e6,
            "kl": run.result["kl"]["mean"],
            "stderr": run.result["kl"]["stderr"],
            "p99": run.result["kl"]["p99"],
            "top-1 agreement": run.result["top1_agreement"],
            **{f"groups {name}": count for name, count in run.result["counts"].items()},
        }
        for run in runs
    }
).T.rename_axis("budget")
table["nats per further bit"] = -table["kl"].diff() / table["bpe"].diff()
table

# %%
recipes = runs[-1].baselines().set_index("name").drop(index="the winner")
figure, axis = plt.subplots(figsize=(8.5, 3.6))
axis.errorbar(
    table["bpe"], table["kl"], 1.96 * table["stderr"], marker="o", capsize=3, label="searched"
)
for name, row in recipes.iterrows():
    axis.errorbar(row.bpe, row.kl, 1.96 * row.stderr, fmt="s", mfc="none", capsize=3, label=name)
axis.set(yscale="log", xlabel="bits per element of the checkpoint", ylabel="KL, nats per token")
axis.legend(frameon=False, fontsize=8)
figure.tight_layout()

# %% [markdown]
# Bars are 95 % intervals. Read the picture from the left. The first tenth of a bit above the floor
# takes three groups of attention of the first layers out of NVFP4, which are small and fragile
# (notebook 02), and a third off the KL. The column `nats per further bit` then falls at every step;
# at 6 bits one layer of experts, too large for the smaller budgets, has its turn. A recipe that
# lies above the line is dominated: the line has the same KL for fewer bits. One that lies on it
# within its interval is as good and simpler to say.
#
# ## A decision, with its uncertainty
#
# A rule that can be defended: the smallest budget whose KL cannot be told from that of the largest
# one considered, or else the budget where a further bit buys less than one is willing to pay. The
# second needs the price and its error.

# %%
step = table[["bpe", "kl", "stderr"]].diff().dropna()
noise = (table["stderr"] ** 2).rolling(2).sum().dropna() ** 0.5
price = pd.DataFrame(
    {
        "from": table["bpe"].shift().loc[step.index],
        "to": table["bpe"].loc[step.index],
        "gain": -step["kl"],
        "s.e.": noise,
        "beyond 2 s.e.": -step["kl"] > 2 * noise,
    }
)
price

# %% [markdown]
# A step marked `False` would be one that these tokens cannot distinguish from no gain at all; the
# last one comes closest to that. It is no proof that there is none: it says to raise
# `report_tokens` before paying for the larger checkpoint. In general the unpaired error used here
# is too large, because hard tokens are hard for every budget.
#
# ## What changes between budgets

# %%
formats = pd.DataFrame(
    {run.result["budget_bpe"]: run.groups()["choice"].str.partition("/")[0] for run in runs}
)
formats.index = [name.removeprefix("model.layers.") for name in formats.index]
formats

# %% [markdown]
# Going right, a group moves from NVFP4 to FP8 to BF16 and stays there, as a rule. One that
# goes *back* is the knapsack making room for a larger group, or a tie broken by noise; neither is
# worth tuning by hand. Groups that are upgraded at every budget are the ones to look at first if
# the source model is ever trained with quantization in mind.
