"""One subject and one seed against ModelOpt: searches, peers, and all of them on fresh tokens.

    python -m experiments.vs_modelopt.run --subject reference --seed 0 --out FILE

`all.sh` runs every subject and seed; `summary.py` joins the files.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

from autoquant.api import Run, search_budgets
from autoquant.data.tokens import Split, TokenPlan
from autoquant.formats import BF16
from autoquant.measure.kl import TokenKl
from autoquant.modelopt.peer import METHODS, Peer
from autoquant.plan.assignment import Assignment
from autoquant.search.confirm import paired_difference
from autoquant.search.problem import Problem
from autoquant.search.propose.baselines import baselines
from autoquant.store.run_directory import ASSIGNMENT
from experiments.common import record
from experiments.common.bench import Bench
from experiments.common.subjects import MAX_ONLY, add_arguments, add_token_arguments, subject

SPACES = {"all": "default", "max": str(MAX_ONLY)}
"""Scale rules that are open, and the space that opens them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--fresh-tokens", type=int, default=65_536)
    parser.add_argument("--budgets", type=float, nargs="*", help="instead of the subject's")
    add_token_arguments(parser)
    parser.add_argument("--trials", type=int, default=30)
    arguments = parser.parse_args()
    chosen = subject(arguments.subject, arguments.models, arguments.texts)
    tokens = TokenPlan(
        calibration=arguments.calibration_tokens,
        search=arguments.search_tokens,
        report=arguments.report_tokens,
        seed=arguments.seed,
    )
    bench = Bench(chosen, SPACES["all"], tokens, arguments.device)
    fresh = bench.fresh(arguments.fresh_tokens)
    peers = {method: Peer(bench.plan, bench.session, method) for method in METHODS}
    result = record.provenance(arguments.commit) | {
        "subject": chosen.name,
        "seed": arguments.seed,
        "scope": str(chosen.scope),
        "device": arguments.device,
        "trials": arguments.trials,
        "tokens": {name: split.tokens for name, split in bench.splits.items()}
        | {"fresh": fresh.tokens},
        "modelopt_seconds": {method: peer.seconds for method, peer in peers.items()},
        "cells": [],
    }
    bpes = tuple(arguments.budgets or chosen.bpes)
    runs = {rules: searched(bench, bpes, space, arguments) for rules, space in SPACES.items()}
    for number, bpe in enumerate(bpes):
        found = {rules: own[number] for rules, own in runs.items()}
        result["cells"].append(cell(bench, bpe, fresh, peers, found))
        record.write(arguments.out, result)


def searched(
    bench: Bench, bpes: Sequence[float], space: str, arguments: argparse.Namespace
) -> list[Run]:
    """The default search of every budget, from one set of probes."""
    started = time.perf_counter()
    name = f"{bench.subject.name}-{Path(space).stem}-{arguments.seed}"
    runs = search_budgets(
        str(bench.subject.path),
        budgets_bpe=bpes,
        budget_scope=str(bench.subject.scope),
        space=space,
        calibration=str(bench.subject.text),
        calibration_tokens=arguments.calibration_tokens,
        search_tokens=arguments.search_tokens,
        report_tokens=arguments.report_tokens,
        trials=arguments.trials,
        seed=arguments.seed,
        device=arguments.device,
        mlflow=False,
        out=arguments.work / name,
    )
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return runs


def cell(
    bench: Bench,
    bpe: float,
    fresh: Split,
    peers: dict[str, Peer],
    runs: dict[str, Run],
) -> dict[str, Any]:
    """One budget: every contender's KL on the fresh tokens, and paired differences."""
    problem = bench.unmeasured_problem(bpe)
    by_peer = {
        method: [(a, bench.score(a, fresh)) for a in peer.choices(problem)]
        for method, peer in peers.items()
    }
    tried = [pair for pairs in by_peer.values() for pair in pairs]
    best_peer = min(tried, key=lambda pair: pair[1].mean)[1] if tried else None
    fixed = {name: bench.score(a, fresh) for name, a in baselines(problem) if problem.fits(a)}
    best_fixed = min(fixed.values(), key=lambda score: score.mean, default=None)
    return {
        "budget_bpe": bpe,
        "modelopt": {
            method: [contender(problem, *pair) for pair in pairs]
            for method, pairs in by_peer.items()
        },
        "baselines": {name: score.mean for name, score in fixed.items()},
        "autoquant": {
            rules: winner(bench, problem, run, fresh, best_peer, best_fixed)
            for rules, run in runs.items()
        },
    }


def winner(
    bench: Bench,
    problem: Problem,
    run: Run,
    fresh: Split,
    peer: TokenKl | None,
    fixed: TokenKl | None,
) -> dict[str, Any]:
    """What a search chose, on the fresh tokens, beside its rivals."""
    assignment = Assignment.read(run.path / ASSIGNMENT)
    score = bench.score(assignment, fresh)
    result: dict[str, Any] = run.result or {}
    return (
        contender(problem, assignment, score)
        | against(score, peer, fixed)
        | {
            "winner": result["winner"],
            "counts": result["counts"],
            "seconds": result["seconds"],
            "report_kl": result["kl"]["mean"],
            "relative_error": result["predictions"]["relative_error"],
            "stages": result["stages"],
        }
    )


def contender(problem: Problem, assignment: Assignment, score: TokenKl) -> dict[str, Any]:
    """Size and KL of one assignment, and what it leaves of the budget."""
    (limit,) = problem.limits
    return {
        "digest": assignment.digest,
        "kl": score.mean,
        "stderr": score.stderr(),
        "bpe": limit.taken(assignment),
        "bytes_left": limit.at_most - limit.cost.total(assignment),
        "cheapest_upgrade": cheapest_upgrade(problem, assignment),
        "groups": {name: str(choice) for name, choice in assignment if choice != BF16},
    }


def cheapest_upgrade(problem: Problem, assignment: Assignment) -> int | None:
    """Fewest bytes that put some group into a costlier choice; None where there is none."""
    accounting = problem.accounting
    extras = [
        extra
        for name, choice in assignment
        for other in accounting.choices[name]
        if (extra := accounting.group_bytes(name, other) - accounting.group_bytes(name, choice)) > 0
    ]
    return min(extras, default=None)


def against(ours: TokenKl, peer: TokenKl | None, fixed: TokenKl | None) -> dict[str, Any]:
    """Paired differences to the best peer and the best baseline, 95 % intervals."""
    rivals = {"to_peer": peer, "to_baseline": fixed}
    return {
        name: None if rival is None else difference(ours, rival) for name, rival in rivals.items()
    }


def difference(ours: TokenKl, rival: TokenKl) -> dict[str, float]:
    """The ratio of two KL, and the interval of their difference over the rival's."""
    paired = paired_difference(ours, rival, seed=0)
    return {
        "ratio": ours.mean / rival.mean,
        "low": paired.low / rival.mean,
        "high": paired.high / rival.mean,
    }


if __name__ == "__main__":
    main()
