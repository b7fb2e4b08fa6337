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
# # Reviewing searches in MLflow
#
# Every search is recorded in MLflow: one run for it and one below it for each trial. After a few
# weeks there are hundreds, and the questions are no longer about one of them:
#
# 1. Which search is the best for each budget?
# 2. What did they cost, and which part of that was worth it?
# 3. Is this version of AutoQuant (or of the model, the text, the settings) worse than the last one?
# 4. Where is the checkpoint that this figure belongs to?
#
# This notebook answers them by queries. It makes its own store first: two budgets of the bundled
# model under two versions. **The older version is acted**: it is this version with q, k and v held
# in NVFP4, as if it could not upgrade them yet, and its version tag is rewritten.
#
# **Settings are small here**: 1,024 tokens for probes and trials, 2 trials and 2,048 tokens for the
# reported KL, against 16,384, 30 and 65,536 by default, so the intervals are wide.

# %%
# %matplotlib inline
import logging
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import mlflow
import pandas as pd
from mlflow import MlflowClient

import autoquant

folder = Path(tempfile.mkdtemp())
pd.options.display.float_format = "{:.4g}".format
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %%
OLDER, NEWER = "0.0.9 (acted)", autoquant.__version__
held = folder / "held.yaml"
held.write_text(
    """\
schema_version: 1
name: held
description: As the default space, but q, k and v have no way out of NVFP4.
rules:
  - {match: head, formats: [bf16], reason: as in the default space}
  - {match: qkv, formats: [nvfp4], reason: the acted version knows no other}
  - {match: "*", formats: [nvfp4, fp8, bf16]}
"""
)
settings = {
    "trials": 2,
    "calibration_tokens": 1_024,
    "search_tokens": 1_024,
    "report_tokens": 2_048,
    "sequence_length": 128,
}

# %% [markdown]
# Without further words searches that share a folder share its store, `mlflow.db`. A team names one
# store for all, here a second file; it may as well be a server's address, and nothing else changes.

# %%
logging.getLogger("mlflow").setLevel(logging.WARNING)  # it says which tables it makes
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'team.db'}"
mlflow.create_experiment("autoquant", artifact_location=(folder / "artifacts").as_uri())

for name, space in (("older", str(held)), ("newer", "default")):
    autoquant.search_budgets(
        budgets_bpe=(5.0, 5.5), space=space, export=True, out=folder / name, **settings
    )

# %%
client = MlflowClient()
for found in mlflow.search_runs(
    experiment_names=["autoquant"],
    filter_string="tags.\"autoquant.run_directory\" LIKE '%/older/%'",
    output_format="list",
):
    client.set_tag(found.info.run_id, "autoquant.version", OLDER)

# %% [markdown]
# ## The searches of an experiment
#
# Only a search that came to its end has `result/kl`, so this condition leaves out trials and
# searches that failed, were interrupted or still run. (To see those:
# `attributes.status = 'FAILED'`, `'KILLED'` or `'RUNNING'`.)

# %%
searches = mlflow.search_runs(
    experiment_names=["autoquant"], filter_string='metrics."result/kl" > 0'
)
searches["search"] = [
    f"{'older' if version == OLDER else 'newer'}, {budget} bits"
    for version, budget in zip(
        searches["tags.autoquant.version"], searches["params.budget_bpe"], strict=True
    )
]
searches = searches.set_index("search").sort_index()
columns = {
    "tags.autoquant.version": "version",
    "params.budget_bpe": "budget",
    "metrics.result/bpe": "bpe",
    "metrics.result/kl": "kl",
    "metrics.result/kl_stderr": "stderr",
    "metrics.result/top1_agreement": "top-1",
    "metrics.recipe/uniform nvfp4": "uniform nvfp4",
}
table = searches[list(columns)].rename(columns=columns)
table["budget"] = table["budget"].astype(float)
table.sort_values(["budget", "version"])

# %% [markdown]
# ## Best per budget
#
# The least KL under each budget. `result/kl` was measured on tokens that no step of the search has
# seen, so taking the least of several is a choice among honest figures; among very many of them it
# would again be a choice of luck. `margin` says by how many standard errors the runner-up is worse.

# %%
ranked = table.sort_values("kl").groupby("budget")
best = ranked.head(1).reset_index().set_index("budget").sort_index()
second = ranked.nth(1).set_index("budget")
best["margin"] = (second["kl"] - best["kl"]) / (second["stderr"] ** 2 + best["stderr"] ** 2) ** 0.5
best[["search", "version", "bpe", "kl", "stderr", "margin"]]

# %% [markdown]
# The errors are treated as independent although all these searches report on the same tokens, and a
# hard token is hard for each of them: the true margins are larger. A margin under two still means
# that either search would do.
#
# ## What it cost
#
# Wall clock of a whole search is its run's end minus its start. Seconds of a single trial are a
# metric of the run below it, so cost can be set against gain by who proposed the trial.

# %%
minutes = (searches["end_time"] - searches["start_time"]).dt.total_seconds() / 60
trials = mlflow.search_runs(
    experiment_names=["autoquant"], filter_string="attributes.run_name LIKE 'trial-%'"
)
search_of = dict(zip(searches["run_id"], searches.index, strict=True))
trials["search"] = trials["tags.mlflow.parentRunId"].map(search_of)
trials["proposed by"] = trials["params.origin"].str.partition(":")[0]
cost = table[["version", "budget"]].assign(
    trials=trials.groupby("search").size(),
    **{
        "trials, minutes": trials.groupby("search")["metrics.seconds"].sum() / 60,
        "all, minutes": minutes,
    },
)
cost.sort_values(["version", "budget"])

# %% [markdown]
# The first search of each version pays for the probes, which the others took over: that is why it
# is the longest, and why asking for several budgets at once is cheap.

# %%
within = trials[trials["params.fits"] == "True"].copy()
within["over the best"] = (
    within["metrics.kl"] / within.groupby("search")["metrics.kl"].transform("min") - 1
)
within.groupby("proposed by").agg(
    trials=("metrics.kl", "size"),
    seconds=("metrics.seconds", "sum"),
    closest=("over the best", "min"),
    typical=("over the best", "median"),
).sort_values("typical")

# %% [markdown]
# `closest` and `typical` are how far above the best assignment of its search a trial of this kind
# was, as a share of KL (0 is the best itself). A kind of trial that is never near 0 over many
# searches is one to leave out; on four searches this is an illustration and no evidence.

# %%
COLOURS = {"5.0": "tab:blue", "5.5": "tab:orange"}

figure, axis = plt.subplots(figsize=(8.5, 3.2))
for name, run_id in searches["run_id"].items():
    points = sorted(client.get_metric_history(run_id, "best_kl"), key=lambda point: point.step)
    axis.step(
        [point.step for point in points],
        [point.value for point in points],
        where="post",
        ls="--" if name.startswith("older") else "-",
        color=COLOURS[searches.loc[name, "params.budget_bpe"]],
        label=name,
    )
axis.set(yscale="log", xlabel="trial", ylabel="best KL on search tokens, nats", title="Progress")
axis.yaxis.set_major_formatter("{x:g}")
axis.yaxis.set_minor_formatter("{x:g}")
axis.legend(frameon=False, fontsize=8, ncols=2)
figure.tight_layout()

# %% [markdown]
# ## Is the newer version worse?
#
# KL compares only between searches of the same model that report on the same tokens for the same
# target. The store knows all three: a tag, the digest of a data set input, a parameter.

# %%
compared = {
    name: {
        "model": found.data.tags["autoquant.source_digest"][:12],
        "report tokens": next(
            used.dataset.digest[:12]
            for used in found.inputs.dataset_inputs
            if any(tag.value == "report" for tag in used.tags)
        ),
        "target": found.data.params.get("target", "blackwell"),
    }
    for name, run_id in searches["run_id"].items()
    for found in [client.get_run(run_id)]
}
pd.DataFrame(compared).T.drop_duplicates()

# %% [markdown]
# One row: all of them compare. The check below is what one would run before a release. It calls a
# budget *worse* when the newer KL is higher by more than two standard errors of the difference; an
# interval that holds 0 is no verdict, and more report tokens are the way to one.


# %%
def regressions(table: pd.DataFrame, older: str, newer: str) -> pd.DataFrame:
    """KL of two versions under each budget, and whether the newer one is worse."""
    one = table[table["version"] == older].set_index("budget").sort_index()
    two = table[table["version"] == newer].set_index("budget").sort_index()
    change = two["kl"] - one["kl"]
    error = (one["stderr"] ** 2 + two["stderr"] ** 2) ** 0.5
    return pd.DataFrame(
        {
            older: one["kl"],
            newer: two["kl"],
            "change": change / one["kl"],
            "s.e.": error / one["kl"],
            "verdict": (change / error)
            .clip(-2, 2)
            .map(lambda z: "worse" if z >= 2 else "better" if z <= -2 else "tied"),
        }
    )


regressions(table, OLDER, NEWER)

# %% [markdown]
# As a gate in a pipeline:
#
#     assert "worse" not in set(regressions(table, OLDER, NEWER)["verdict"])
#
# The same question backwards shows what a regression looks like, here of going back to the version
# that keeps q, k and v in NVFP4:

# %%
regressions(table, NEWER, OLDER)

# %% [markdown]
# ## What changed between two of them
#
# First the settings, which are parameters of the run, then the assignment itself, which is an
# artifact.

# %%
pair = ["older, 5.0 bits", "newer, 5.0 bits"]
params = pd.DataFrame(
    {name: client.get_run(searches.loc[name, "run_id"]).data.params for name in pair}
)
params = params.map(lambda value: str(value).replace(str(folder), "..."))
params[params[pair[0]] != params[pair[1]]]

# %%
assignments = pd.DataFrame(
    {
        name: mlflow.artifacts.load_dict(f"runs:/{searches.loc[name, 'run_id']}/result.json")[
            "counts"
        ]
        for name in pair
    }
)
assignments

# %% [markdown]
# Each trial has its assignment too, as `assignment.json`: the one that came second can be scored
# on more tokens or exported (`autoquant export MODEL --assignment assignment.json`) without a new
# search.

# %%
close = trials[(trials["search"] == pair[1]) & (trials["params.fits"] == "True")]
runner_up = close.sort_values("metrics.kl").iloc[1]
assignment = mlflow.artifacts.load_dict(f"runs:/{runner_up['run_id']}/assignment.json")
print(f"{runner_up['tags.mlflow.runName']}, proposed by {runner_up['params.origin']}")
pd.Series(assignment["groups"]).value_counts().to_frame("groups")

# %% [markdown]
# ## Where is the checkpoint?
#
# An exported checkpoint is a *logged model* that lies outside of MLflow: its figures, its model
# card and where it is, without a copy of the weights.

# %%
SHOWN = ("result/kl", "result/bpe", "result/checkpoint_bytes")
models = mlflow.search_logged_models(
    experiment_ids=list(searches["experiment_id"].unique()), output_format="list"
)
pd.DataFrame(
    [
        {
            "search": search_of[model.source_run_id],
            "checkpoint": model.tags["autoquant.checkpoint"].replace(str(folder), "..."),
            **{metric.key: metric.value for metric in model.metrics if metric.key in SHOWN},
        }
        for model in models
    ]
).sort_values("search")

# %% [markdown]
# ## On the page
#
#     mlflow ui --backend-store-uri sqlite:///runs/mlflow.db
#
# shows the same: paste `metrics."result/kl" > 0` into the search field of the experiment, tick the
# searches to be compared and press *Compare*. A run's *Overview* has the verdict and the table of
# baselines, *Artifacts* its report. Picture by picture: `docs/review.md`.
