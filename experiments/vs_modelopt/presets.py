"""A search against ModelOpt's with each of its presets, all in the codes that they would export.

    python -m experiments.vs_modelopt.presets --subject reference --seed 0 --mode w4a4 --out FILE

Everybody gets the same calibration and search tokens and the same bytes of the searched layers.
What each picks is measured on fresh tokens, with the input scales that it would export: ModelOpt's
hold the largest calibration input, ours twice that.

In the peer's favour: its codes are those of our kernels, so that its GPTQ has our damping and order
of columns; of the assignments that its solver finds around a budget, the one that is best on the
fresh tokens counts.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import autoquant
from autoquant.api import Run
from autoquant.data.tokens import Split, TokenPlan
from autoquant.export.layouts.presets import presets
from autoquant.formats import NVFP4
from autoquant.measure.calibration import Calibration
from autoquant.measure.kl import TokenKl
from autoquant.modelopt.peer import METHODS, Peer
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Scope
from autoquant.report.record import RunRecord
from autoquant.run.observer import Logged
from autoquant.run.polishing import is_polished, make_polish
from autoquant.search.problem import Problem
from autoquant.store.run_directory import ASSIGNMENT
from experiments.common import record
from experiments.common.bench import Bench
from experiments.common.subjects import add_arguments, subject
from experiments.vs_modelopt.run import contender, difference

PRESETS = {
    name: choice
    for name, choice in presets().items()
    if choice.format == NVFP4.format and not choice.keeps_input
} | {"NVFP4_DEFAULT_CFG, gptq": replace(NVFP4, rounding="gptq")}
"""ModelOpt's presets for NVFP4, and the choice whose codes stand for each."""

BUDGETS = (4.75, 5.0, 5.5, 6.0)


def main() -> None:
    arguments = _arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        bench = _bench(arguments, Path(folder))
        fresh = bench.fresh(arguments.fresh_tokens)
        result = record.provenance(arguments.commit) | {
            "subject": bench.subject.name,
            "seed": arguments.seed,
            "mode": str(bench.mode),
            "effort": arguments.effort,
            "tokens": {name: split.tokens for name, split in bench.splits.items()}
            | {"fresh": fresh.tokens},
            "cells": [{"budget_bpe": bpe, "modelopt": {}} for bpe in arguments.budgets],
        }
        best: list[TokenKl | None] = [None] * len(arguments.budgets)
        for preset, method in ((p, m) for p in arguments.presets for m in METHODS):
            peer = Peer(bench.plan, bench.session, method, PRESETS[preset])
            for number, cell in enumerate(result["cells"]):
                row, kl = _of_peer(bench, peer, cell["budget_bpe"], fresh)
                cell["modelopt"][f"{preset} {method}"] = row
                best[number] = min(filter(None, (best[number], kl)), key=_mean, default=None)
            record.write(arguments.out, result)
        for cell, run, rival in zip(
            result["cells"], _searched(bench, arguments), best, strict=True
        ):
            cell["autoquant"] = _of_run(bench, run, cell["budget_bpe"], fresh, rival)
            record.write(arguments.out, result)


def _bench(arguments: argparse.Namespace, folder: Path) -> Bench:
    chosen = subject(arguments.subject, arguments.models, arguments.texts)
    tokens = TokenPlan(
        calibration=arguments.calibration_tokens,
        search=arguments.search_tokens,
        report=arguments.report_tokens,
        seed=arguments.seed,
    )
    mode = ActivationMode(arguments.mode)
    searched = replace(chosen, scope=Scope.SEARCHED)
    return Bench(searched, "default", tokens, arguments.device, mode, folder)


def _of_peer(
    bench: Bench, peer: Peer, bpe: float, fresh: Split
) -> tuple[dict[str, Any] | None, TokenKl | None]:
    """The best on the fresh tokens of what ModelOpt's solver finds around a budget."""
    problem = bench.unmeasured_problem(bpe)
    tried = [(bench.score(own, fresh), own) for own in peer.choices(problem)]
    if not tried:
        return None, None
    kl, assignment = min(tried, key=lambda pair: pair[0].mean)
    seconds = peer.seconds["calibrate and score"] + peer.seconds["solve"]
    return _row(bench, problem, assignment, kl) | {"tried": len(tried), "seconds": seconds}, kl


def _of_run(
    bench: Bench, run: Run, bpe: float, fresh: Split, rival: TokenKl | None
) -> dict[str, Any]:
    """What a search chose, polish included, on the fresh tokens."""
    result: Mapping[str, Any] = run.result or {}
    assignment = Assignment.read(run.path / ASSIGNMENT)
    session = bench.session
    calibration = Calibration.from_dict(RunRecord.read(run.path).calibration or {})
    session.quantized.set_input_scales(calibration.scales())
    if is_polished(assignment):
        make_polish(session, assignment, result["polish"]["key"], Logged())
    report = session.scorer.score(assignment, bench.splits["report"]).mean
    if not math.isclose(report, result["kl"]["mean"], rel_tol=1e-9):
        raise RuntimeError(f"{run.path}: {report} here, {result['kl']['mean']} in its result")
    kl = session.scorer.score(assignment, fresh)
    row = _row(bench, bench.unmeasured_problem(bpe), assignment, kl) | {
        "is_polished": is_polished(assignment),
        "seconds": result["seconds"]["total"],
    }
    if rival is not None:
        row["to_best_peer"] = difference(kl, rival)
    print(row, flush=True)
    return row


def _row(bench: Bench, problem: Problem, assignment: Assignment, kl: TokenKl) -> dict[str, Any]:
    size = bench.plan.accounting.checkpoint_bytes(assignment)
    return contender(problem, assignment, kl) | {"checkpoint_bytes": size}


def _searched(bench: Bench, arguments: argparse.Namespace) -> Iterator[Run]:
    yield from autoquant.search_budgets(
        bench.subject.path,
        budgets_bpe=arguments.budgets,
        budget_scope=str(bench.subject.scope),
        calibration=str(bench.subject.text),
        calibration_tokens=arguments.calibration_tokens,
        search_tokens=arguments.search_tokens,
        report_tokens=arguments.report_tokens,
        sequence_length=bench.tokens.sequence_length,
        batch_tokens=bench.tokens.batch_tokens,
        activation_mode=arguments.mode,
        effort=arguments.effort,
        seed=arguments.seed,
        device=arguments.device,
        mlflow=False,
        out=arguments.work / f"{bench.subject.name}-{arguments.mode}-{arguments.seed}",
    )


def _mean(kl: TokenKl) -> float:
    return kl.mean


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--mode", choices=["w4a4", "w4a16"], default="w4a4")
    parser.add_argument("--effort", choices=["default", "max"], default="max")
    parser.add_argument("--presets", nargs="*", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS))
    parser.add_argument("--fresh-tokens", type=int, default=65_536)
    for name in ("calibration", "search", "report"):
        default = getattr(TokenPlan(), name)
        parser.add_argument(f"--{name}-tokens", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
