"""Candidates around the best, with a scorer that adds up what each group costs."""

import numpy as np
import pytest
import torch
from autoquant.search.refine import Effort, refine
from tiny_models import save_model

from autoquant.data.tokens import Split
from autoquant.formats import NVFP4, Choice, ScaleRule
from autoquant.measure.kl import TokenKl
from autoquant.measure.sensitivity import Sensitivity, keys_of
from autoquant.plan.budget import Budget, Scope
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import load_space
from autoquant.search.limits import Bounds
from autoquant.search.problem import Problem
from autoquant.search.trials import Ledger, Stage
from autoquant.source.source import open_source

HARM = {"nvfp4/max": 8.0, "nvfp4/mse": 6.0, "nvfp4/four_over_six": 7.0, "fp8": 1.0, "bf16": 0.0}
TOKENS = Split.unrelated("search", (torch.zeros(2, 32, dtype=torch.int64),), digest="0")


class Summing:
    """Every token of an assignment costs the sum of its groups."""

    def score_batch(self, assignment, split, index):
        kl = sum(HARM[str(choice)] for _, choice in assignment) * 1e-3
        tokens = split.batches[index]
        return TokenKl(
            kl=np.full(tokens.numel(), kl),
            sequence=np.repeat(np.arange(2), tokens.shape[1]),
            unit=split.units[index],
        )


@pytest.fixture
def problem(tmp_path):
    source = open_source(save_model("llama", tmp_path / "source"))
    plan = make_plan(source, load_space("default"))
    kl = {(group, c): HARM[str(c)] * 1e-3 for group, c in keys_of(plan.options.choices)}
    sensitivity = Sensitivity(kl, dict.fromkeys(kl, 0.0))
    return Problem(
        accounting=plan.accounting,
        limits=(plan.limit(Budget(6.0, Scope.SEARCHED)),),
        sensitivity=sensitivity,
    )


@pytest.mark.parametrize("proposer", ["runners_up", "reweight", "refit", "swaps"])
def test_a_closed_scale_rule_is_proposed_by_nobody(problem, proposer):
    """The best so far uses the rule that the joint check has closed since."""
    ledger = Ledger(
        Summing(), TOKENS, problem.accounting, problem.fits, earlier=(), keep=lambda _: None
    )
    best = ledger.measure(problem.optimum(), Stage.SOLVER, "optimum")
    closed = Choice(NVFP4.format, ScaleRule.MSE)
    assert closed in dict(best.assignment).values()
    sound = problem.without(ScaleRule.MSE)
    ledger.measure(sound.optimum(), Stage.SOLVER, "sound")
    assert ledger.best() is best
    nothing = {"runners_up": 0, "reweight": 0, "refit": 0, "swaps": 0}
    bounds = Bounds(lambda: True)
    refine(sound, ledger, Effort(**{**nothing, proposer: 4}), seed=0, bounds=bounds)
    proposed = ledger.trials[2:]
    assert proposed or proposer == "reweight"
    assert all(sound.allows(trial.assignment) and trial.fits for trial in proposed)
