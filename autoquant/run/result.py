"""`result.json`: what a search found, how well it is known, and what it rests on."""

import platform
import sys
from typing import Any

import autoquant
from autoquant.environment import package_versions
from autoquant.measure.calibration import Calibration
from autoquant.measure.kl import TokenScores
from autoquant.measure.session import Session
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Scope
from autoquant.plan.model_costs import CostKind
from autoquant.plan.plan import Plan
from autoquant.run.by_token.positions import describe_positions
from autoquant.run.by_token.worst import describe_tokens
from autoquant.run.config import SearchConfig
from autoquant.run.confirmation import Confirmed
from autoquant.run.polishing import Winner
from autoquant.search.confirm import Difference
from autoquant.search.history import History
from autoquant.search.predictions import describe_predictions
from autoquant.search.problem import Problem
from autoquant.search.stage_table import stage_table
from autoquant.search.trials import Stage, Trial

PACKAGES = ("torch", "transformers", "optuna", "numpy")


def make_result(
    config: SearchConfig,
    plan: Plan,
    session: Session,
    problem: Problem,
    history: History,
    calibration: Calibration,
    confirmed: Confirmed,
    winner: Winner,
) -> dict[str, Any]:
    """The contents of `result.json`, without times; KL in nats per token on the report split."""
    trial, assignment, scores = confirmed.trial, winner.assignment, winner.scores
    accounting = plan.accounting
    active = {scope: plan.cost(CostKind.ACTIVE_BYTES, scope) for scope in Scope}
    return {
        "model": plan.source.model,
        "source": {"digest": plan.source.digest, "revision": plan.source.revision},
        "space": plan.space.name,
        "budget_bpe": config.budget.bpe,
        "budget_scope": str(config.budget.scope),
        "bpe": {str(scope): accounting.bpe(assignment, scope) for scope in Scope},
        "checkpoint_bytes": accounting.checkpoint_bytes(assignment),
        "cost": str(config.cost),
        # a cost table need not know refitted codes, which cost what those that they replace do
        "limits": [limit.to_dict(trial.assignment) for limit in problem.limits],
        "active": {
            "bytes_per_token": active[Scope.CHECKPOINT].total(assignment),
            "bpe": {str(scope): active[scope].number(assignment) for scope in Scope},
        },
        "target": str(config.served_by),
        "activation_mode": str(config.mode),
        "kv_cache": str(config.kv_cache),
        "kl": scores.summary(),
        "noise_floor": confirmed.noise_floor,
        "top1_agreement": scores.top1_agreement(),
        "perplexity": scores.perplexity(),
        "winner": {
            "stage": str(trial.stage),
            "name": trial.name,
            "trial": trial.number,
            "digest": assignment.digest,
            "search_kl": trial.kl,
            "predicted_kl": problem.predicted(trial.assignment),
        },
        "baselines": [
            _row(t, s)
            for t, s in zip(confirmed.candidates, confirmed.scores, strict=True)
            if t.stage is Stage.BASELINE
        ],
        "finalists": [
            _row(t, confirmed.scores[i]) | _difference(confirmed.differences.get(i))
            for i, t in enumerate(confirmed.candidates)
            if t.stage is not Stage.BASELINE or i == confirmed.winner
        ],
        **({"by_position": _by_position(confirmed, winner)} if config.report_by else {}),
        "resolution": confirmed.resolution,
        "counts": assignment.counts(),
        "fitted": _fitted(session, assignment),
        "polish": None if winner.polish is None else winner.polish.to_dict(),
        "trials": len(history.trials),
        "stages": stage_table(history.trials),
        "solver": _solver(problem),
        "predictions": describe_predictions(problem, history),
        "tokens": {
            name: {
                "tokens": s.tokens,
                "asked": getattr(config.tokens, name),
                "sequences": s.sequences,
                "unit": str(s.unit),
                "units": s.unit_count,
                "digest": s.digest,
            }
            for name, s in session.splits.items()
        },
        "experts": _experts(calibration),
        "calibration": config.text,
        "uncalibrated": list(calibration.unseen),
        "seed": config.seed,
        "device": str(session.loaded.device),
        "versions": {"autoquant": autoquant.__version__} | package_versions(PACKAGES),
        "python": sys.version.split()[0],
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _solver(problem: Problem) -> dict[str, float]:
    """The optimum's summed KL of single groups, nats per token, and what it may be above the least;
    zero unless the solver gave up on an exact answer.
    """
    solution = problem.knapsack.solution
    return {"predicted_kl": solution.score, "bound": solution.bound, "gap": solution.gap}


def _fitted(session: Session, assignment: Assignment) -> dict[str, Any] | None:
    """How many linears take a choice whose codes are fitted to inputs, and which have codes of the
    weight alone all the same, and why; None where no group takes one.
    """
    book = session.quantized.book
    groups = [
        (group, choice)
        for group in session.quantized.groups
        if (choice := assignment[group.name]).format.needs_moments(choice)
    ]
    if not groups:
        return None
    plain = {
        name: why for group, choice in groups for name, why in book.plain(group, choice).items()
    }
    return {"linears": sum(len(group.linears) for group, _ in groups), "plain": plain}


def _experts(calibration: Calibration) -> dict[str, Any] | None:
    """How calibration covered the experts, or None for a model without any."""
    coverage = calibration.coverage()
    if coverage is None:
        return None
    return coverage.to_dict() | {"all_experts": calibration.all_experts}


def _baselines(confirmed: Confirmed) -> dict[str, TokenScores]:
    return {
        trial.name: scores
        for trial, scores in zip(confirmed.candidates, confirmed.scores, strict=True)
        if trial.stage is Stage.BASELINE
    }


def _by_position(confirmed: Confirmed, winner: Winner) -> list[dict[str, Any]]:
    """The winner first, and each recipe."""
    return describe_positions({"the winner": winner.scores, **_baselines(confirmed)})


def make_tokens(session: Session, confirmed: Confirmed, winner: Winner) -> dict[str, Any]:
    """The contents of `tokens.json`: the winner token by token, baselines as histograms."""
    return describe_tokens(
        winner.scores,
        _baselines(confirmed),
        session.splits["report"],
        session.loaded.tokenizer.decode,
    )


def _row(trial: Trial, scores: TokenScores) -> dict[str, Any]:
    return {
        "name": trial.name,
        "stage": str(trial.stage),
        "trial": trial.number,
        "bpe": trial.bpe,
        "fits": trial.fits,
        "kl": scores.mean,
        "stderr": scores.stderr(),
        "search_kl": trial.kl,
    }


def _difference(difference: Difference | None) -> dict[str, Any]:
    if difference is None:
        return {}
    return {
        "to_solver": {
            "mean": difference.mean,
            "low": difference.low,
            "high": difference.high,
        }
    }
