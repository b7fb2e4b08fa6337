"""What measures the trials of a search: this process, others of this machine, or of others."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoquant import collector
from autoquant.errors import RunConflict
from autoquant.measure.calibration import Calibration
from autoquant.measure.evaluator import Evaluator
from autoquant.measure.ranks.ranks import ALONE
from autoquant.measure.session import Session
from autoquant.measure.workers.pool import WorkerPool
from autoquant.measure.workers.process import ProcessWorker, serve
from autoquant.progress import Progress, Silent
from autoquant.run.config import SearchConfig
from autoquant.run.machines.following import outline
from autoquant.run.machines.joining import offer_of
from autoquant.run.measuring import local_evaluator, make_ready
from autoquant.run.opening import open_plan
from autoquant.run.sensitivity.probing import open_to_probe
from autoquant.source.source import Source
from autoquant.study.joining.roster import Roster
from autoquant.study.joining.worker import JoinedWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a worker measures, and what it has to find where this process found it."""

    config: SearchConfig
    folder: Path
    """Where moments of inputs are kept, and codes."""
    calibration: dict[str, Any]
    """Of this process."""
    outline: list[tuple[str, str]]
    """Of the model's files."""
    tokens: str
    """Digest of the search tokens."""
    together: int
    """Requests that go through the blocks together at least."""


@contextmanager
def evaluator_of_search(
    config: SearchConfig,
    session: Session,
    calibration: Calibration,
    source: Source,
    folder: Path,
    observer: Progress,
    roster: Roster | None,
) -> Iterator[Evaluator]:
    """What measures the trials of a search: this process, as many as the settings say, and those
    that join.

    Args:
        config: of one budget.
        session: calibrated.
        calibration: its.
        source: its model.
        folder: where moments of inputs are kept, and codes.
        observer: told of a worker that has ended.
        roster: of workers that join from other machines; None where none may.
    """
    split = session.splits["search"]
    together = -(-config.trials_at_once // config.workers)
    own = local_evaluator(session, together)
    if config.workers == 1 and roster is None:
        yield own
        return
    if roster is not None:
        roster.offer(offer_of(session, calibration))
    order = Order(
        config=config,
        folder=folder.absolute(),
        calibration=calibration.to_dict(),
        outline=outline(source),
        tokens=split.digest,
        together=together,
    )
    with _threads_for(config.workers) as threads:
        workers = [
            ProcessWorker(
                number,
                __name__,
                order,
                {"LOCAL_RANK": str(number), "OMP_NUM_THREADS": str(threads)},
            )
            for number in range(1, config.workers)
        ]

        def newcomers() -> Sequence[JoinedWorker]:
            found = [] if roster is None else roster.newcomers()
            for worker in found:
                observer.note(f"{worker.title} takes part.")
            return found

        with WorkerPool(own, workers, warn=observer.warn, newcomers=newcomers) as pool:
            yield pool


@contextmanager
def _threads_for(processes: int) -> Iterator[int]:
    """Leave each process its share of the threads, which no result depends on."""
    import torch

    before = torch.get_num_threads()
    share = max(1, before // processes)
    torch.set_num_threads(share)
    try:
        yield share
    finally:
        torch.set_num_threads(before)


def _evaluator_of(order: Order) -> Evaluator:
    """The model of an order, ready to measure.

    Raises:
        RunConflict: it is another model than the search has opened, or its tokens are others.
        OutOfMemory: the model does not fit beside those of the other processes.
        SourceError: text or model missing, damaged or not understood.
    """
    config, silent = order.config, Silent()
    plan = open_plan(config)
    session = open_to_probe(config, plan, order.folder, silent, ALONE)
    split = session.splits["search"]
    if (outline(plan.source), split.digest) != (order.outline, order.tokens):
        raise RunConflict(
            f"the files of {plan.source.model}, or the text {config.text!r}, have changed since "
            "the search opened them.",
            fix="leave them as they are while a search runs, and give the same command again.",
        )
    make_ready(session, plan, order.calibration, silent)
    return local_evaluator(session, order.together)


if __name__ == "__main__":
    collector.rest()
    serve(int(sys.argv[1]), _evaluator_of)
