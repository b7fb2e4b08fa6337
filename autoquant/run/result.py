"""`result.json`: what a search found, how well it is known, and what it rests on."""

import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import autoquant
from autoquant.measure.calibration import Calibration
from autoquant.measure.kl import TokenScores
from autoquant.measure.session import Session
from autoquant.measure.worst import describe_tokens
from autoquant.plan.budget import Scope
from autoquant.plan.cost import Cost
from autoquant.plan.plan import Plan
from autoquant.run.config import SearchConfig
from autoquant.search.confirm import Difference
from autoquant.search.predictions import describe_predictions
from autoquant.search.problem import Problem
from autoquant.search.trials import Ledger, Stage, Trial

PACKAGES = ("torch", "transformers", "optuna", "numpy")


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """Finalists and baselines on the report split."""

    candidates: tuple[Trial, ...]
    """The solver's optimum first."""
    scores: tuple[TokenScores, ...]
    winner: int
    differences: Mapping[int, Difference]
    """Of each candidate within the budget to the solver's optimum."""
    noise_floor: float
    """Mean KL between two BF16 runs, nats per token."""

    @property
    def trial(self) -> Trial:
        """The winner."""
        return self.candidates[self.winner]

    @property
    def resolution(self) -> float:
        """Half the widest interval of a finalist's difference to the solver's optimum, relative to
        the optimum's KL; NaN where it was the only finalist.
        """
        halves = [
            (difference.high - difference.low) / 2
            for i, difference in self.differences.items()
            if i > 0 and self.candidates[i].stage is not Stage.BASELINE
        ]
        return max(halves, default=math.nan) / max(self.scores[0].mean, 1e-300)


def make_result(
    config: SearchConfig,
    session: Session,
    plan: Plan,
    problem: Problem,
    ledger: Ledger,
    calibration: Calibration,
    confirmed: Confirmed,
) -> dict[str, Any]:
    """The contents of `result.json`, without times; KL in nats per token on the report split."""
    trial, scores = confirmed.trial, confirmed.scores[confirmed.winner]
    accounting, active = plan.accounting, plan.charged(Cost.ACTIVE_BYTES)
    return {
        "model": config.source.model,
        "source": {"digest": config.source.digest, "revision": config.source.revision},
        "space": config.space.name,
        "budget_bpe": config.budget.bpe,
        "budget_scope": str(config.budget.scope),
        "bpe": {str(scope): accounting.bpe(trial.assignment, scope) for scope in Scope},
        "checkpoint_bytes": accounting.checkpoint_bytes(trial.assignment),
        "cost": str(config.cost),
        "active": {
            "bytes_per_token": active.checkpoint_bytes(trial.assignment),
            "bpe": {str(scope): active.bpe(trial.assignment, scope) for scope in Scope},
        },
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
            "digest": trial.assignment.digest,
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
        "resolution": confirmed.resolution,
        "counts": trial.assignment.counts(),
        "trials": len(ledger.trials),
        "stages": _stages(ledger),
        "predictions": describe_predictions(problem, ledger, accounting),
        "tokens": {
            name: {
                "tokens": s.tokens,
                "asked": getattr(config.tokens, name),
                "sequences": s.sequences,
                "digest": s.digest,
            }
            for name, s in session.splits.items()
        },
        "experts": _experts(calibration),
        "calibration": config.calibration,
        "uncalibrated": list(calibration.unseen),
        "seed": config.seed,
        "device": str(session.loaded.device),
        "versions": {"autoquant": autoquant.__version__}
        | {name: version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _experts(calibration: Calibration) -> dict[str, Any] | None:
    """How calibration covered the experts, or None for a model without any."""
    coverage = calibration.coverage()
    if coverage is None:
        return None
    return coverage.to_dict() | {"all_experts": calibration.all_experts}


def make_tokens(session: Session, confirmed: Confirmed) -> dict[str, Any]:
    """The contents of `tokens.json`: the winner token by token, baselines as histograms."""
    baselines = {
        trial.name: scores
        for trial, scores in zip(confirmed.candidates, confirmed.scores, strict=True)
        if trial.stage is Stage.BASELINE
    }
    return describe_tokens(
        confirmed.scores[confirmed.winner],
        baselines,
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


def _stages(ledger: Ledger) -> list[dict[str, Any]]:
    """What each stage measured and contributed, in the order in which they began.

    `best_kl` is the least KL on the search split within the budget after the stage, `gain` by how
    much the stage lowered it, nats per token; `stopped` counts candidates that lost their race.
    """
    rows: dict[Stage, dict[str, Any]] = {}
    best = math.inf
    for trial in ledger.trials:
        row = rows.setdefault(
            trial.stage,
            {
                "stage": str(trial.stage),
                "trials": 0,
                "stopped": 0,
                "tokens": 0,
                "seconds": 0.0,
                "gain": 0.0,
            },
        )
        row["trials"] += 1
        row["stopped"] += trial.is_stopped
        row["tokens"] += trial.tokens
        row["seconds"] += trial.seconds
        if trial.fits and not trial.is_stopped and trial.kl < best:
            row["gain"] += best - trial.kl if math.isfinite(best) else 0.0
            best = trial.kl
        row["best_kl"] = best
    return list(rows.values())
