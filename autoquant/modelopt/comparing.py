"""What ModelOpt's search picks for a run's model, budget and tokens, beside what ours picked."""

from collections.abc import Mapping
from typing import Any

from autoquant.errors import ConfigError
from autoquant.measure.sensitivity import Sensitivity, keys_of
from autoquant.modelopt.peer import METHODS, Peer
from autoquant.plan.model_costs import CostKind
from autoquant.report.compare import Rival
from autoquant.report.record import RunRecord
from autoquant.run.observer import Observer
from autoquant.run.opening import limits_of
from autoquant.run.subjects.finished import config_of, reopen, require_finished, subject_of
from autoquant.search.problem import Problem
from autoquant.store.run_directory import read_json, write_json

MODELOPT = "modelopt.json"
"""In a run directory: what ModelOpt's methods picked, measured on its report tokens."""


def rivals_of(run: RunRecord, observer: Observer) -> tuple[Rival, ...]:
    """The best pick of each method of `mtq.auto_quantize`, measured once and kept in the run.

    Both methods get the run's weights, calibration and search tokens and formats. Eight targets
    around the budget are solved for; of what keeps the budget in bytes, the pick of least KL on the
    report tokens counts, which is in ModelOpt's favour.

    Args:
        run: finished, under a budget of stored bits.
        observer: told of progress.

    Raises:
        ConfigError: the run is not finished or limits something else, or ModelOpt is missing.
        SourceError: model or text missing or damaged.
        RunConflict: model or text are no longer those of the run.
    """
    result = require_finished(run)
    stored = read_json(run.path, MODELOPT)
    if stored is None or stored["of"] != subject_of(result):
        stored = _measured(run, result, observer)
        write_json(run.path, MODELOPT, stored)
    return tuple(Rival(run=run, **row) for row in stored["picks"])


def _measured(run: RunRecord, result: Mapping[str, Any], observer: Observer) -> dict[str, Any]:
    config = config_of(run)
    if config.cost is not CostKind.BITS or config.cost_table is not None:
        raise ConfigError(
            f"{run.path} limits {config.cost}, and ModelOpt counts stored bits alone.",
            fix="compare runs under a budget of bits.",
        )
    opened = reopen(run, config, observer)
    plan, session = opened.plan, opened.session
    unmeasured = dict.fromkeys(keys_of(plan.options.choices), 0.0)
    problem = Problem(
        accounting=plan.accounting,
        limits=limits_of(config, plan),
        sensitivity=Sensitivity(unmeasured, unmeasured),
    )
    picks = []
    for method in METHODS:
        observer.stage(f"ModelOpt {method}", 1)
        peer = Peer(plan, session, method)
        tried = [
            (session.scorer.score(assignment, session.splits["report"]), assignment)
            for assignment in peer.choices(problem)
        ]
        observer.step()
        if not tried:
            observer.warn(f"ModelOpt's {method} finds nothing that keeps {config.budget.bpe} bits.")
            continue
        kl, best = min(tried, key=lambda pair: pair[0].mean)
        picks.append(
            {
                "method": method,
                "bpe": plan.accounting.bpe(best),
                "checkpoint_bytes": plan.accounting.checkpoint_bytes(best),
                "kl": kl.mean,
                "stderr": kl.stderr(),
                "tried": len(tried),
                "seconds": peer.seconds["calibrate and score"] + peer.seconds["solve"],
                "groups": {name: str(choice) for name, choice in best},
            }
        )
    return {"of": subject_of(result), "picks": picks}
