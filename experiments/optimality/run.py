"""How far the search is from the enumerated optimum, and how well probes predict.

    python -m experiments.optimality.run --subject stories260K --seed 0 --out FILE

On the search split, per budget: the joint KL of the default search's best candidate over that of
the best of all assignments that fill the budget, wherever those are few enough to measure; and
predicted against measured KL of 150 random assignments. The fresh tokens are those of
`vs_modelopt`.
"""

import argparse
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from autoquant.arrays import Floats
from autoquant.data.tokens import Split, TokenPlan
from autoquant.search.history import History
from autoquant.search.predictor import Predictor
from autoquant.search.problem import Problem
from autoquant.search.relaxation import Selection
from autoquant.search.surrogate import Surrogate
from experiments.common import record
from experiments.common.bench import Bench
from experiments.common.enumerate import TooMany, is_maximal, maximal, random_filled
from experiments.common.subjects import MAX_ONLY, add_arguments, subject

SPACES = {"max": str(MAX_ONLY), "all": "default"}
"""Scale rules that are open, and the space that opens them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--search-tokens", type=int, default=TokenPlan().search)
    parser.add_argument("--fresh-tokens", type=int, default=65_536)
    parser.add_argument("--random", type=int, default=150, help="random assignments per budget")
    parser.add_argument("--most", type=int, default=3000, help="assignments to enumerate at most")
    parser.add_argument("--most-fresh", type=int, default=200, help="of those on fresh tokens")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--rules", nargs="*", choices=SPACES, default=list(SPACES))
    parser.add_argument("--budgets", type=float, nargs="*", help="instead of the subject's")
    arguments = parser.parse_args()
    chosen = subject(arguments.subject, arguments.models, arguments.texts)
    tokens = TokenPlan(search=arguments.search_tokens, seed=arguments.seed)
    result = record.provenance(arguments.commit) | {
        "subject": chosen.name,
        "seed": arguments.seed,
        "scope": str(chosen.scope),
        "trials": arguments.trials,
        "cells": [],
    }
    for rules in arguments.rules:
        bench = Bench(chosen, SPACES[rules], tokens, arguments.device)
        splits = bench.splits["search"], bench.fresh(arguments.fresh_tokens)
        result["tokens"] = {split.name: split.tokens for split in splits}
        sensitivity = bench.probe()
        for bpe in arguments.budgets or chosen.bpes:
            row = {"rules": rules, "budget_bpe": bpe}
            row |= cell(bench, bench.problem(bpe, sensitivity), *splits, arguments)
            result["cells"].append(row)
            record.write(arguments.out, result)


def cell(
    bench: Bench, problem: Problem, split: Split, fresh: Split, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One budget under one set of scale rules."""
    history, _ = bench.explore(problem, arguments.trials)
    best = history.best()
    assert best is not None
    return {
        "searched": {"kl": best.kl, "stage": str(best.stage), "trials": len(history.trials)},
        "is_filled": is_maximal(problem, problem.selection(best.assignment)),
        "optimum": enumerated(bench, problem, split, fresh, arguments),
        "prediction": predicted(bench, problem, split, history, arguments),
    }


def enumerated(
    bench: Bench, problem: Problem, split: Split, fresh: Split, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The best of all assignments that fill the budget, where they are few enough.

    `fresh_kl` is the least KL on the fresh tokens themselves: no search can do better there.
    """
    try:
        selections = maximal(problem, arguments.most)
    except TooMany:
        return {"assignments": f"more than {arguments.most}", "kl": None, "fresh_kl": None}
    kl = [bench.score(problem.decode(s), split).mean for s in selections]
    found = {"assignments": len(selections), "kl": min(kl), "median": float(np.median(kl))}
    if len(selections) > arguments.most_fresh:
        return found | {"fresh_kl": None}
    return found | {"fresh_kl": min(bench.score(problem.decode(s), fresh).mean for s in selections)}


def predicted(
    bench: Bench, problem: Problem, split: Split, history: History, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Predictors against the measured KL of random assignments.

    What is fitted is fitted on the candidates of the search, none of which is drawn.
    """
    known = {problem.selection(t.assignment) for t in history.trials}
    drawn = random_filled(problem, arguments.random, arguments.seed)
    selections = [s for s in drawn if s not in known]
    if len(selections) < 10:
        return {"assignments": len(selections)}
    kl = np.array([bench.score(problem.decode(s), split).mean for s in selections])
    return {"assignments": len(selections)} | {
        name: {
            "relative_error": float(np.mean(np.abs(values - kl) / kl)),
            "spearman": float(spearmanr(values, kl).statistic),
        }
        for name, values in predictions(problem, history, selections).items()
    }


def predictions(
    problem: Problem, history: History, selections: list[Selection]
) -> dict[str, Floats]:
    """Predicted KL, nats per token, [S], by each predictor."""
    alone = Surrogate.of(problem, with_pairs=False)
    predictor = Predictor(problem)
    observed = predictor.observed(history)
    seen = observed.selections, observed.kl
    return {
        "sum": alone.quadratic(selections),
        "sum_mapped": alone.fitted(*seen).predict(selections),
        "interactions": predictor.fitted(history).predict(selections),
        "refitted": predictor.refitted(history).predict(selections),
    }


if __name__ == "__main__":
    main()
