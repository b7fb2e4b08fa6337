"""How well single groups predict the whole, with and without their interactions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from autoquant.arrays import Floats
from autoquant.errors import InfeasibleBudget
from autoquant.search.history import History
from autoquant.search.predictor import Predictor
from autoquant.search.problem import Problem
from autoquant.search.relaxation import Selection
from autoquant.search.surrogate import Surrogate

FOLDS = 5
FRONTIER_POINTS = 25


def describe_predictions(problem: Problem, history: History) -> dict[str, Any]:
    """The entry `predictions` of `result.json`; KL in nats per token on the search split.

    Every candidate is predicted by fits that have not seen it: each of five takes its turn to be
    left out.

    Args:
        problem: what was searched.
        history: what was measured.
    """
    predictor = Predictor(problem)
    surrogate, observed = predictor.surrogate, predictor.observed(history)
    selections, kl = observed.selections, observed.kl
    fitted = surrogate.fitted(selections, kl)
    alone = _left_out(Surrogate.of(problem, with_pairs=False), selections, kl)
    joint = _left_out(surrogate, selections, kl)
    return {
        "strength": fitted.strength,
        "share": fitted.share,
        "scale": fitted.law.scale,
        "exponent": fitted.law.exponent,
        "relative_error": {
            "sum": _relative_error(surrogate.quadratic(selections), kl),
            "sum_mapped": _relative_error(alone, kl),
            "with_interactions": _relative_error(joint, kl),
        },
        "trials": [
            {"trial": trial.number, "kl": float(predicted)}
            for trial, predicted in zip(observed.trials, joint, strict=True)
        ],
        "frontier": predicted_frontier(problem, fitted),
    }


def predicted_frontier(problem: Problem, fitted: Surrogate) -> list[dict[str, float]]:
    """Predicted KL of the solver's optimum from the least of the first limit to the most.

    All from one set of probes; a row has `bpe` (of the checkpoint) and `kl`. Where a second limit
    cannot be kept, there is no row.
    """
    choices, limit = problem.accounting.choices, problem.limits[0]
    low, high = limit.taken(limit.cost.cheapest(choices)), limit.taken(limit.cost.dearest(choices))
    rows = []
    for number in np.linspace(low, high, FRONTIER_POINTS):
        other = problem.at(float(number))
        try:
            selection = other.knapsack.solve()
        except InfeasibleBudget:
            continue
        size = problem.accounting.bpe(other.decode(selection))
        rows.append({"bpe": size, "kl": float(fitted.predict([selection])[0])})
    return rows


def _left_out(surrogate: Surrogate, selections: Sequence[Selection], kl: Floats) -> Floats:
    """Each candidate's prediction by a fit without its fold."""
    folds = np.arange(len(kl)) % FOLDS
    predicted = np.empty(len(kl))
    for fold in np.unique(folds):
        inside = np.flatnonzero(folds == fold).tolist()
        outside = np.flatnonzero(folds != fold).tolist()
        fit = surrogate.fitted([selections[i] for i in outside], kl[outside])
        predicted[inside] = fit.predict([selections[i] for i in inside])
    return predicted


def _relative_error(predicted: Floats, measured: Floats) -> float:
    """Mean of |predicted - measured| / measured; NaN where nothing is measured above zero."""
    known = measured > 0.0
    if not known.any():
        return float("nan")
    return float(np.mean(np.abs(predicted[known] - measured[known]) / measured[known]))
