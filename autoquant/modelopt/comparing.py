"""What ModelOpt's search picks for a run's model, budget and tokens, beside what ours picked."""

from collections.abc import Mapping
from typing import Any

from autoquant.errors import ConfigError, RunConflict
from autoquant.formats import BF16
from autoquant.measure.calibration import Calibration
from autoquant.measure.sensitivity import Sensitivity, keys_of
from autoquant.modelopt.peer import METHODS, Peer
from autoquant.plan.kv_cache import cached_attention
from autoquant.plan.model_costs import CostKind
from autoquant.report.compare import Rival
from autoquant.report.record import RunRecord
from autoquant.run.config import SearchConfig
from autoquant.run.config.file import read_settings
from autoquant.run.measuring import open_measuring, use_calibration
from autoquant.run.observer import Observer
from autoquant.run.opening import limits_of, open_plan
from autoquant.search.problem import Problem
from autoquant.store.run_directory import CONFIG, read_json, write_json

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
    if run.result is None:
        raise ConfigError(
            f"{run.path} is {run.status}: there is nothing to compare ModelOpt's choice with.",
            fix="let the search finish: the same command goes on with it.",
        )
    stored = read_json(run.path, MODELOPT)
    if stored is None or stored["of"] != _subject(run.result):
        stored = _measured(run, run.result, observer)
        write_json(run.path, MODELOPT, stored)
    return tuple(Rival(run=run, **row) for row in stored["picks"])


def _subject(result: Mapping[str, Any]) -> dict[str, Any]:
    """What picks depend on."""
    return {
        "model": result["source"]["digest"],
        "budget_bpe": result["budget_bpe"],
        "tokens": {name: split["digest"] for name, split in result["tokens"].items()},
    }


def _measured(run: RunRecord, result: Mapping[str, Any], observer: Observer) -> dict[str, Any]:
    settings = read_settings(run.path / CONFIG, SearchConfig)
    config = SearchConfig.of(settings | {"budget_bpe": [result["budget_bpe"]]})
    if config.cost is not CostKind.BITS or config.cost_table is not None:
        raise ConfigError(
            f"{run.path} limits {config.cost}, and ModelOpt counts stored bits alone.",
            fix="compare runs under a budget of bits.",
        )
    plan = open_plan(config)
    session = open_measuring(
        config,
        plan.source,
        [group for group in plan.groups if plan.options.choices[group.name] != (BF16,)],
        cached_attention(config.kv_cache, plan.groups),
        observer,
        mode=config.mode,
    )
    found = {name: split.digest for name, split in session.splits.items()}
    if plan.source.digest != result["source"]["digest"] or found != _subject(result)["tokens"]:
        raise RunConflict(
            f"the model or the text of {run.path} has changed since.",
            fix="restore them, or search anew.",
        )
    calibration = Calibration.from_dict(run.calibration or {})
    use_calibration(session, calibration, observer)
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
    return {"of": _subject(result), "picks": picks}
