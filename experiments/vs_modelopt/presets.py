"""A search against ModelOpt's with each of its presets, all in the codes that they would export.

    python -m experiments.vs_modelopt.presets --subject reference --seed 0 --mode w4a4 --out FILE

Everybody gets the same calibration and search tokens and the same bytes of the searched layers.
What each picks is measured on fresh tokens, with the input scales that it would export: ModelOpt's
hold the largest calibration input, ours twice that.

Its codes are those of our kernels, on second moments in which all rows count alike, as it takes
them. In its favour: its GPTQ has our damping and order of columns; of the assignments that its
solver finds around a budget, the one that is best on the fresh tokens counts.

With `--equalized` ours searches a copy that `autoquant equalize` makes from the same calibration
tokens: it computes what the model computes, bit by bit, and has its size.

With `--peers-of RESULT` ModelOpt does not search again, but where `--peers` names some: its best
assignments of an earlier result with the same settings are measured again on the fresh tokens.
"""

import argparse
import gc
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import autoquant
from autoquant.api import Run
from autoquant.data.tokens import Split, TokenPlan
from autoquant.errors import first_line
from autoquant.export.layouts.presets import presets
from autoquant.formats import NVFP4, Choice
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
from experiments.common.processes import in_processes
from experiments.common.subjects import Subject, add_arguments, add_token_arguments, subject
from experiments.vs_modelopt.run import contender, difference

PRESETS = {
    name: choice
    for name, choice in presets().items()
    if choice.format == NVFP4.format and not choice.keeps_input
} | {"NVFP4_DEFAULT_CFG, gptq": replace(NVFP4, rounding="gptq")}
"""ModelOpt's presets for NVFP4, and the choice whose codes stand for each."""

PEERS = {f"{preset} {method}": (preset, method) for preset in PRESETS for method in METHODS}

BUDGETS = (4.75, 5.0, 5.5, 6.0)
SPLITS = ("calibration", "search", "report", "fresh")
NEAR = 0.05
"""How far the KL of the same choices may be from what it was, in shares: GPUs add in other orders,
and codes differ in last bits between versions."""

SHARED = ("load", "calibrate", "statistics", "probe")
"""Stages that searches of several budgets have in common."""

Found = tuple[dict[str, Any] | None, TokenKl | None]
"""Of a contender at a budget: its row, and its KL on the fresh tokens; None where nothing fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every contender is given."""

    subject: str
    models: Path
    texts: Path
    seed: int
    mode: str
    effort: str
    equalized: bool
    device: str
    budgets: tuple[float, ...]
    calibration_tokens: int
    search_tokens: int
    report_tokens: int
    fresh_tokens: int
    batch_tokens: int
    work: Path
    """For run directories, which stay."""
    codes: Path
    """For codes and statistics, which do not."""


def main() -> None:
    arguments = _arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    given = vars(arguments) | {"budgets": tuple(arguments.budgets)}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        given |= {"codes": Path(folder)}
        settings = Settings(**{field.name: given[field.name] for field in fields(Settings)})
        table = _Table(settings, arguments)
        with in_processes(arguments.processes) as pool:
            tasks: dict[Future[list[Found]], str | None] = {}
            tasks[pool.submit(_of_searches, settings)] = None
            if arguments.peers_of is not None:
                earlier = _earlier(arguments.peers_of, settings)
                table.put_all(pool.submit(_of_earlier, settings, earlier).result())
            for name in arguments.peers:
                tasks[pool.submit(_of_peer, settings, *PEERS[name])] = name
            for done in as_completed(tasks):
                table.put(tasks[done], done)


class _Table:
    """The result, written again whenever a contender has come to an end."""

    def __init__(self, settings: Settings, arguments: argparse.Namespace) -> None:
        self._out = arguments.out
        self._result = record.provenance(arguments.commit) | {
            name: value for name, value in record.settings(arguments).items() if name != "commit"
        }
        self._cells = {bpe: _Cell() for bpe in settings.budgets}
        self._failed: dict[str, str] = {}

    def put(self, name: str | None, done: Future[list[Found]]) -> None:
        """Take in a contender at all budgets: the name of a peer, or None for our searches."""
        if name is None:
            for cell, (row, kl) in zip(self._cells.values(), done.result(), strict=True):
                cell.row, cell.kl = row, kl
        elif error := done.exception():
            self._failed[name] = first_line(error)
        else:
            for cell, found in zip(self._cells.values(), done.result(), strict=True):
                cell.peers[name] = found
        self._write()

    def put_all(self, cells: Sequence[Mapping[str, Found]]) -> None:
        """Take in all peers of each budget."""
        for cell, peers in zip(self._cells.values(), cells, strict=True):
            cell.peers |= peers
        self._write()

    def _write(self) -> None:
        cells = [{"budget_bpe": bpe} | cell.to_dict() for bpe, cell in self._cells.items()]
        record.write(self._out, self._result | {"failed": self._failed, "cells": cells})


class _Cell:
    """All contenders at one budget."""

    def __init__(self) -> None:
        self.peers: dict[str, Found] = {}
        self.row: dict[str, Any] | None = None
        self.kl: TokenKl | None = None

    def to_dict(self) -> dict[str, Any]:
        best = min(
            (kl for _, kl in self.peers.values() if kl), key=lambda kl: kl.mean, default=None
        )
        ours = self.row
        if ours is not None and self.kl is not None and best is not None:
            ours = ours | {"to_best_peer": difference(self.kl, best)}
        return {"modelopt": {name: row for name, (row, _) in self.peers.items()}} | (
            {} if ours is None else {"autoquant": ours}
        )


@lru_cache(maxsize=1)
def _bench_of_peers(settings: Settings) -> Bench:
    """One for all peers of a process."""
    chosen = subject(settings.subject, settings.models, settings.texts)
    return _bench(settings, chosen, settings.codes / str(os.getpid()), weighs_rows=False)


def _bench(settings: Settings, chosen: Subject, folder: Path, *, weighs_rows: bool) -> Bench:
    """The model and its tokens, with the codes and statistics of a folder."""
    tokens = TokenPlan(
        calibration=settings.calibration_tokens,
        search=settings.search_tokens,
        report=settings.report_tokens,
        batch_tokens=settings.batch_tokens,
        seed=settings.seed,
    )
    searched = replace(chosen, scope=Scope.SEARCHED)
    mode = ActivationMode(settings.mode)
    return Bench(searched, "default", tokens, settings.device, mode, folder, weighs_rows)


def _of_peer(settings: Settings, preset: str, method: str) -> list[Found]:
    """What ModelOpt's solver finds around each budget: the best of it on the fresh tokens."""
    bench = _bench_of_peers(settings)
    bench.session.quantized.set_input_scales(bench.calibration.scales())
    peer = Peer(bench.plan, bench.session, method, PRESETS[preset])
    fresh = bench.fresh(settings.fresh_tokens)
    return [_best(bench, peer, bpe, fresh) for bpe in settings.budgets]


def _best(bench: Bench, peer: Peer, bpe: float, fresh: Split) -> Found:
    problem = bench.unmeasured_problem(bpe)
    tried = [(bench.score(own, fresh), own) for own in peer.choices(problem)]
    if not tried:
        return None, None
    kl, assignment = min(tried, key=lambda pair: pair[0].mean)
    seconds = peer.seconds["calibrate and score"] + peer.seconds["solve"]
    return _row(bench, problem, assignment, kl) | {"tried": len(tried), "seconds": seconds}, kl


def _earlier(path: Path, settings: Settings) -> list[dict[str, Any]]:
    """The peers' rows at each budget of an earlier result.

    Raises:
        SystemExit: it has other settings.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    for name in ("subject", "seed", "mode", *(f"{split}_tokens" for split in SPLITS)):
        if result[name] != getattr(settings, name):
            raise SystemExit(f"{path} has {name} {result[name]}, not {getattr(settings, name)}")
    cells = {cell["budget_bpe"]: cell["modelopt"] for cell in result["cells"]}
    return [cells[bpe] for bpe in settings.budgets]


def _of_earlier(settings: Settings, cells: Sequence[dict[str, Any]]) -> list[dict[str, Found]]:
    """The rows of peers; those that may be a budget's best with their KL here.

    Raises:
        RuntimeError: it is far from the KL that the row says.
    """
    bench = _bench_of_peers(settings)
    bench.session.quantized.set_input_scales(bench.calibration.scales())
    fresh = bench.fresh(settings.fresh_tokens)
    return [
        {name: _again(bench, fresh, rows, name) for name, row in rows.items() if row}
        for rows in cells
    ]


def _again(bench: Bench, fresh: Split, rows: Mapping[str, Any], name: str) -> Found:
    row, least = rows[name], min(own["kl"] for own in rows.values() if own)
    if row["kl"] > (1 + NEAR) * least:
        return row, None
    chosen = {group: Choice.parse(text) for group, text in row["groups"].items()}
    kl = bench.score(Assignment.of(chosen), fresh)
    if not math.isclose(kl.mean, row["kl"], rel_tol=NEAR):
        raise RuntimeError(f"{name} gives {kl.mean}, and gave {row['kl']}")
    return row | {"kl": kl.mean, "stderr": kl.stderr()}, kl


def _of_searches(settings: Settings) -> list[Found]:
    """What the searches of all budgets chose, polish included, on the fresh tokens."""
    chosen = subject(settings.subject, settings.models, settings.texts)
    if settings.equalized:
        chosen = replace(chosen, path=_equalized(settings, chosen))
    runs = _searched(settings, chosen)
    gc.collect()  # their model, and what it kept of logits
    bench = _bench(settings, chosen, runs[0].path, weighs_rows=True)  # which keeps codes of all
    calibration = Calibration.from_dict(RunRecord.read(runs[0].path).calibration or {})
    bench.session.quantized.set_input_scales(calibration.scales())
    for run in runs:
        _require_its_kl(bench, run)
    bench.session.scorer.forget(bench.splits["report"])  # logits of 65,536 tokens fill gigabytes
    found: list[Found] = []
    for bpe, run in zip(settings.budgets, runs, strict=True):
        assignment = _in_use(bench, run)
        kl = bench.session.scorer.score(assignment, bench.fresh(settings.fresh_tokens))
        row = _row(bench, bench.unmeasured_problem(bpe), assignment, kl) | {
            "is_polished": is_polished(assignment),
            "seconds": _seconds(run, runs[0]),
        }
        print(row, flush=True)
        found.append((row, kl))
    return found


def _in_use(bench: Bench, run: Run) -> Assignment:
    """The assignment of a run, whose refitted codes are in use where it has such."""
    assignment = Assignment.read(run.path / ASSIGNMENT)
    if is_polished(assignment):
        make_polish(bench.session, assignment, (run.result or {})["polish"]["key"], Logged())
    return assignment


def _require_its_kl(bench: Bench, run: Run) -> None:
    """Raise RuntimeError if a run's assignment has another KL here than in its result."""
    report = bench.session.scorer.score(_in_use(bench, run), bench.splits["report"]).mean
    said = (run.result or {})["kl"]["mean"]
    if not math.isclose(report, said, rel_tol=1e-9):
        raise RuntimeError(f"{run.path}: {report} here, {said} in its result")


def _seconds(run: Run, first: Run) -> float:
    """What a search would have taken alone: its own seconds, and those of what the first did for
    all.
    """
    own, shared = ((each.result or {})["seconds"] for each in (run, first))
    return float(own["total"] + sum(max(0.0, shared[s] - own.get(s, 0.0)) for s in SHARED))


def _row(bench: Bench, problem: Problem, assignment: Assignment, kl: TokenKl) -> dict[str, Any]:
    size = bench.plan.accounting.checkpoint_bytes(assignment)
    return contender(problem, assignment, kl) | {"checkpoint_bytes": size}


def _equalized(settings: Settings, chosen: Subject) -> Path:
    """A copy of the model with channels of like size, by the same calibration tokens."""
    return autoquant.equalized_copy(
        chosen.path,
        out=settings.work / f"{settings.subject}-{settings.mode}-{settings.seed}-equalized",
        calibration=str(chosen.text),
        calibration_tokens=settings.calibration_tokens,
        sequence_length=TokenPlan().sequence_length,
        batch_tokens=settings.batch_tokens,
        seed=settings.seed,
        device=settings.device,
    )


def _searched(settings: Settings, chosen: Subject) -> list[Run]:
    """A search for each budget, which share their probes."""
    return autoquant.search_budgets(
        chosen.path,
        budgets_bpe=settings.budgets,
        budget_scope=str(Scope.SEARCHED),
        calibration=str(chosen.text),
        calibration_tokens=settings.calibration_tokens,
        search_tokens=settings.search_tokens,
        report_tokens=settings.report_tokens,
        sequence_length=TokenPlan().sequence_length,
        batch_tokens=settings.batch_tokens,
        activation_mode=settings.mode,
        effort=settings.effort,
        seed=settings.seed,
        device=settings.device,
        mlflow=False,
        export=False,
        out=settings.work / f"{settings.subject}-{settings.mode}-{settings.seed}",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--mode", choices=["w4a4", "w4a16"], default="w4a4")
    parser.add_argument("--effort", choices=["default", "max"], default="max")
    parser.add_argument("--equalized", action="store_true", help="ours searches an equalized copy")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="that search; by default all")
    parser.add_argument("--peers-of", type=Path, help="an earlier result with the same settings")
    parser.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS))
    parser.add_argument("--fresh-tokens", type=int, default=65_536)
    add_token_arguments(parser)
    parser.add_argument("--batch-tokens", type=int, default=TokenPlan().batch_tokens)
    parser.add_argument(
        "--processes", type=int, default=1, help="contenders at a time, whose seconds are then more"
    )
    arguments = parser.parse_args()
    if arguments.peers is None:
        arguments.peers = [] if arguments.peers_of else [*PEERS]
    return arguments


if __name__ == "__main__":
    main()
