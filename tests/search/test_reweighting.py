"""What a reweighting asks the knapsack for, and what Optuna may ask of it."""

import math

import numpy as np
import pytest
from tiny_models import save_model

from autoquant.formats import BF16, FP8
from autoquant.measure.sensitivity import Sensitivity, keys_of
from autoquant.plan.budget import Budget
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import parse_space
from autoquant.search.history import History
from autoquant.search.problem import Problem
from autoquant.search.propose.reweight import Reweightings
from autoquant.source.source import open_source
from autoquant.study.sampling import OPTUNAS

SPACE = "schema_version: 1\nname: s\nrules:\n  - {match: '*', formats: [nvfp4/max, fp8, bf16]}\n"

TPE = OPTUNAS["tpe"]


def problem_of(folder, layers):
    """A model whose head is open too; one group measured slightly better than BF16."""
    source = open_source(save_model("llama", folder, num_hidden_layers=layers))
    plan = make_plan(source, parse_space(SPACE, "space.yaml"))
    generator = np.random.default_rng(layers)
    kl = {
        key: 1e-3 * math.exp(generator.normal()) * (0.1 if key[1] == FP8 else 1.0)
        for key in keys_of(plan.options.choices)
    }
    kl[plan.groups.groups[1].name, FP8] = -1e-9
    return Problem(
        accounting=plan.accounting,
        limits=(plan.limit(Budget(8.0)),),
        sensitivity=Sensitivity(kl, dict.fromkeys(kl, 0.0)),
    )


@pytest.mark.parametrize("layers", [1, 3])
def test_a_reweighting_is_the_optimum_of_scores_by_role_depth_and_exponent(tmp_path, layers):
    problem = problem_of(tmp_path / "model", layers)
    assert [group.layer for group in problem.groups].count(None) == 1
    proposed = Reweightings(problem, trials=20, seed=0, sampler=TPE).propose(History(), 9)
    assert len(proposed) > 3
    for proposal in proposed:
        params = proposal.params

        def score(group, choice, params=params):
            """The head counts as half way, and the only layer of a model as the first."""
            kl = problem.sensitivity[group.name, choice]
            if choice == BF16 or kl <= 0:
                return 0.0
            depth = {None: 0.5, 0: 0.0, 1: 0.5, 2: 1.0}[group.layer]
            weight = params[f"role.{group.role}"] + params["depth"] * (depth - 0.5)
            return kl ** params["exponent"] * math.exp(weight)

        scores = problem.scores(score)
        assert proposal.assignment == problem.decode(problem.knapsack.with_scores(scores).solve())


def test_parameters_cover_their_ranges(tmp_path):
    problem = problem_of(tmp_path / "model", 2)
    roles = {f"role.{group.role}" for group in problem.groups}
    asked = [
        p.params
        for p in Reweightings(problem, trials=40, seed=0, sampler=TPE).propose(History(), 25)
    ]
    assert all(params.keys() == roles | {"depth", "exponent"} for params in asked)
    for name in asked[0]:
        low, high = (0.5, 1.5) if name == "exponent" else (-1.5, 1.5)
        values = [params[name] for params in asked]
        assert low <= min(values) < low + 0.25 * (high - low)
        assert high >= max(values) > high - 0.25 * (high - low)


def test_asks_are_numbered_and_no_more_than_eight_a_trial(tmp_path):
    problem = problem_of(tmp_path / "model", 1)
    proposer, history = Reweightings(problem, trials=3, seed=0, sampler=TPE), History()
    found = proposer.propose(history, 10**6)
    numbers = [int(proposal.name.removeprefix("ask ")) for proposal in found]
    assert numbers == sorted(set(numbers))
    assert 0 in numbers
    assert max(numbers) < 24
    assert proposer.propose(history, 10**6) == []
