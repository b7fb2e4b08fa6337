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
# # Sensitivity: what is fragile, and why
#
# Before it chooses formats, a search *probes*: each layer group in each choice alone, everything
# else in BF16, and the KL of the model's output from BF16. This notebook reads those probes of
# the bundled model and asks four questions that decide whether to trust what a search makes of
# them:
#
# 1. Which groups are fragile, and fragile *for what they cost*?
# 2. Is it the weights or the activations?
# 3. Do the NVFP4 scale rules differ by more than noise?
# 4. Do the sensitivities of single groups say anything about a whole assignment?
#
# **Settings are small here**: 2,048 tokens a probe in 16 sequences, against 16,384 in 64 by
# default. That is enough for what follows because the groups differ by factors, not by percents;
# where it is not enough the intervals say so. Error bars are one standard error over sequences
# (tokens of one sequence are not independent).

# %%
# %matplotlib inline
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import autoquant

folder = Path(tempfile.mkdtemp())
pd.options.display.float_format = "{:.4g}".format
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# Two searches without trials, so little more than their probes: one as Blackwell serves (`w4a4`:
# inputs of NVFP4 layers are NVFP4 too), one as Hopper serves (`w4a16`: inputs stay BF16).

# %%
runs = {
    mode: autoquant.search(
        budget_bpe=5.0,
        activation_mode=mode,
        probe="exact",
        trials=0,
        calibration_tokens=2_048,
        search_tokens=2_048,
        report_tokens=2_048,
        sequence_length=128,
        mlflow=False,
        export=False,
        out=folder / mode,
    )
    for mode in ("w4a4", "w4a16")
}
groups = runs["w4a4"].groups()
probes = {mode: run.sensitivity().set_index(["group", "choice"]) for mode, run in runs.items()}

# %% [markdown]
# ## 1. Fragile, and fragile for what it costs

# %%
SHORT = {name: f"{row.layer} {row.role}" for name, row in groups.iterrows()}
NVFP4 = ["nvfp4/max", "nvfp4/mse", "nvfp4/four_over_six"]
COLOURS = {"qkv": "tab:blue", "o": "tab:orange", "experts": "tab:green"}

kl = probes["w4a4"]["kl"].unstack().loc[groups.index]
stderr = probes["w4a4"]["stderr"].unstack().loc[groups.index]
table = groups[["role", "layer", "elements"]].assign(
    nvfp4=kl["nvfp4/mse"], nvfp4_se=stderr["nvfp4/mse"], fp8=kl["fp8"], fp8_se=stderr["fp8"]
)

figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4))
for role, rows in table.groupby("role", sort=False):
    axes[0].errorbar(
        rows["layer"], rows["nvfp4"], rows["nvfp4_se"], marker="o", color=COLOURS[role], label=role
    )
    axes[0].errorbar(
        rows["layer"], rows["fp8"], rows["fp8_se"], marker="x", ls=":", color=COLOURS[role]
    )
    per_element = 1e6 / rows["elements"]
    axes[1].errorbar(
        rows["layer"],
        rows["nvfp4"] * per_element,
        rows["nvfp4_se"] * per_element,
        marker="o",
        color=COLOURS[role],
    )
axes[0].set(yscale="log", xlabel="layer", ylabel="KL, nats per token", title="alone in one format")
axes[1].set(yscale="log", xlabel="layer", ylabel="per million weights", title="NVFP4, for its size")
axes[0].legend(frameon=False, title="o NVFP4, x FP8")
figure.tight_layout()

# %% [markdown]
# Left: from the first layer to the last the KL of attention falls by an order of magnitude in
# *both* formats; that of experts falls too, less in NVFP4. So position makes a group fragile before
# its role does: what is wrong after layer 0 goes through five more layers and through every later
# choice of experts, what is wrong in layer 5 goes straight to the output. Between the formats lies
# a factor of three to eight for attention (next table).
#
# Right: the same per million weights, and the roles come apart. In the last layers experts hurt as
# much as attention or more, but they are 89 % of the weights: weight for weight attention is five
# to forty times as sensitive. A budget is spent by the weight, so this is the picture that predicts
# who is upgraded: attention of the first layers.

# %%
table["nvfp4 / fp8"] = table["nvfp4"] / table["fp8"]
extra = pd.Series(
    {
        group["name"]: group["choices"]["fp8"] - group["choices"]["nvfp4/mse"]
        for group in json.loads((runs["w4a4"].path / "groups.json").read_text())["groups"]
    }
)
table["gain per extra kB"] = (table["nvfp4"] - table["fp8"]) / (extra / 1000)
table["chosen"] = groups["choice"]
table.sort_values("gain per extra kB", ascending=False).drop(columns=["nvfp4_se", "fp8_se"]).head(
    10
)

# %% [markdown]
# The column `gain per extra kB` is what the knapsack solver trades: nats per token that FP8 instead
# of NVFP4 buys, for each stored kilobyte. `chosen` follows it from the top until the budget of 5.0
# bits is full, with exceptions where a large group does not fit any more (the solver is exact, not
# greedy). A group that is chosen against this order and not for its size would be a reason to look
# closer.
#
# ## 2. Weights or activations?
#
# With `w4a16` only the weights are quantized to four bits. What remains of a group's KL is the
# weights' part; the difference is what its quantized *inputs* add.

# %%
parts = pd.DataFrame(
    {mode: found["kl"].unstack()["nvfp4/mse"] for mode, found in probes.items()}
).loc[groups.index]
share = 1 - parts["w4a16"] / parts["w4a4"]
error = (
    share.rsub(1)
    * (
        sum(
            (found["stderr"].unstack()["nvfp4/mse"] / found["kl"].unstack()["nvfp4/mse"]) ** 2
            for found in probes.values()
        )
    )
    ** 0.5
).loc[groups.index]
by_role = share.groupby(groups["role"], sort=False).agg(["min", "mean", "max"])
by_role["one s.e. of a group"] = error.groupby(groups["role"]).mean()
by_role

# %%
figure, axis = plt.subplots(figsize=(9.5, 2.6))
colours = groups["role"].map(COLOURS)
axis.bar(range(len(share)), share, yerr=error, color=colours, alpha=0.8, capsize=2)
axis.set_xticks(range(len(share)), [SHORT[name] for name in groups.index], rotation=60, ha="right")
axis.set(ylim=(0, 1), ylabel="share of KL", title="what NVFP4 inputs add to NVFP4 weights")
axis.axhline(0.5, color="grey", lw=0.8, ls=":")
figure.tight_layout()

# %% [markdown]
# Half is what two equally large, independent errors would give, and most groups are near it: inputs
# add half to 60 % on average over a role, with about a tenth of error a group. A group far above
# suffers from its inputs: there a better scale rule for the weight cannot help much and FP8 is the
# remedy (or a server that keeps inputs in BF16, which is what a report with `--activation-mode
# w4a16` shows). A group far below it suffers from its weights: there the scale rules of the next
# section are worth trying. The bars treat the two modes as independent; they share their tokens, so
# they are too long.
#
# ## 3. Do the scale rules differ by more than noise?
#
# All three store the same bits. `max` scales a block to its largest weight, `mse` searches for the
# scale of least squared error, `four_over_six` lets a block use 4 instead of 6 as its largest
# magnitude. They are measured on the same sequences, so the differences are compared sequence by
# sequence, which `sensitivity.jsonl` keeps.

# %%
log = pd.read_json(runs["w4a4"].path / "sensitivity.jsonl", lines=True)
by_sequence = {
    choice: rows.groupby("group")["sequence_kl"].sum().loc[groups.index]
    for choice, rows in log.groupby("choice")
}


def paired(first: str, second: str) -> pd.DataFrame:
    """Relative difference of KL, first over second, with its standard error over sequences."""
    rows = {}
    for name in groups.index:
        a, b = pd.Series(by_sequence[first][name]), pd.Series(by_sequence[second][name])
        difference, base = a - b, b.mean()
        rows[name] = {
            "difference": difference.mean() / base,
            "stderr": difference.std() / len(difference) ** 0.5 / base,
        }
    return pd.DataFrame(rows).T


figure, axis = plt.subplots(figsize=(9.5, 3))
for shift, rule in ((-0.12, "mse"), (0.12, "four_over_six")):
    found = paired(f"nvfp4/{rule}", "nvfp4/max")
    places = [place + shift for place in range(len(found))]
    axis.errorbar(places, found["difference"], 2 * found["stderr"], fmt="o", ms=4, label=rule)
axis.axhline(0, color="grey", lw=0.8)
axis.set_xticks(range(len(groups)), [SHORT[n] for n in groups.index], rotation=60, ha="right")
axis.set(ylabel="relative to max", title="KL of the scale rules, paired, two standard errors")
axis.yaxis.set_major_formatter("{x:+.0%}")
axis.legend(frameon=False, ncols=2)
figure.tight_layout()

# %%
verdicts = {}
for rule in ("mse", "four_over_six"):
    found = paired(f"nvfp4/{rule}", "nvfp4/max")
    z = found["difference"] / found["stderr"]
    verdicts[rule] = {
        "mean difference": found["difference"].mean(),
        "better beyond 2 s.e.": int((z < -2).sum()),
        "tied": int((z.abs() <= 2).sum()),
        "worse beyond 2 s.e.": int((z > 2).sum()),
    }
pd.DataFrame(verdicts).T

# %% [markdown]
# On average over the groups `mse` beats `max` by some 4 % for no bits at all, `four_over_six` is
# level with it, and for most single groups neither difference leaves its interval on this few
# tokens. What follows: let the search choose per group (it does, and checks the chosen rules
# jointly), do not read much into *which* rule one group got, and do not expect the joint KL to fall
# by more than the mean difference.
#
# ## 4. From groups to an assignment
#
# The solver adds the groups' own KLs up. The picture sets that sum against the measured KL of whole
# assignments.

# %%
runs["w4a4"].plot_prediction()

# %%
trials = runs["w4a4"].trials()
trials["measured / sum"] = trials["kl"] / trials["predicted_kl"]
trials[["stage", "name", "bpe", "predicted_kl", "kl", "stderr", "measured / sum"]].sort_values(
    "predicted_kl"
)

# %% [markdown]
# The sum is not the KL of the assignment: measured ones are at 0.4 to 0.8 of it, near 0.64 where
# most of the weights are NVFP4. What a solver needs is weaker, that the *order* is right, and
# between assignments of quite different sums it is. Between assignments whose sums are within a
# few percent (the runners-up of a search) it is not, and that is why a search measures those
# jointly and confirms the finalists on fresh tokens instead of returning the solver's first
# answer unseen.
#
# ## How many tokens?

# %%
relative = (stderr / kl).stack()
needed = 2_048 * (relative / 0.05) ** 2
print(f"relative standard error of a probe on 2,048 tokens: median {relative.median():.0%}")
print(f"tokens for 5 % of each probe: median {needed.median():,.0f}, largest {needed.max():,.0f}")
ranks = kl["nvfp4/mse"].sort_values(ascending=False)
gaps = ranks.diff(-1).dropna()
noise = (stderr["nvfp4/mse"][ranks.index] ** 2).rolling(2).sum().shift(-1).dropna() ** 0.5
print(
    f"neighbours in the ranking told apart at two s.e.: {(gaps > 2 * noise).sum()} of {len(gaps)}"
)

# %% [markdown]
# Neighbours in the ranking mostly cannot be told apart (unpaired), the top from the bottom easily.
# That is what a search needs of its probes: an upgrade given to the third instead of the fourth
# most sensitive group costs next to nothing, precisely because they are alike. Spend tokens on the
# `report` split first.
