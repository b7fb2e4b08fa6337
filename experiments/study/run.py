"""What the study costs a search: time in Optuna and in the journal, without measuring anything.

python experiments/study/run.py
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from autoquant.formats import Choice
from autoquant.plan.assignment import Assignment
from autoquant.search.trials import Stage, Trial
from autoquant.store.run_directory import STUDY, RunDirectory
from autoquant.study.journal import StudyLog, read_trials
from autoquant.study.live import LiveStudy
from autoquant.study.record import Sequences, StudyForm
from autoquant.study.space import StudySpace

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.record import provenance, write

CHOICES = ("nvfp4/max", "nvfp4/mse", "nvfp4/four_over_six", "nvfp4/mse/gptq", "fp8", "bf16")
SEQUENCES = 65
"""Of the default search tokens."""


class Clock:
    """Processor time by what it was spent on, seconds."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        begun = time.process_time()
        yield
        self.spent[what] = self.spent.get(what, 0.0) + time.process_time() - begun


def trials_of(space: StudySpace, count: int) -> Iterator[Trial]:
    """Random assignments with random KL."""
    generator = np.random.default_rng(0)
    for number in range(count):
        chosen = {g: legal[generator.integers(len(legal))] for g, legal in space.choices.items()}
        kl = tuple(map(float, generator.uniform(0.01, 0.02, SEQUENCES)))
        yield Trial(
            number=number,
            stage=Stage.REFIT,
            name=f"rank {number}",
            assignment=Assignment.of(chosen),
            kl=float(np.mean(kl)),
            stderr=0.0005,
            sequence_kl=kl,
            tokens=16_448,
            is_stopped=False,
            bpe=5.0,
            fits=True,
            seconds=1.0,
        )


def measure(groups: int, trials: int) -> dict[str, float]:
    """Processor time of a whole search's study, and of reading it again, seconds."""
    legal = tuple(map(Choice.parse, CHOICES))
    space = StudySpace({f"model.layers.{n}.mlp": legal for n in range(groups)})
    sequences = Sequences(document=tuple(range(SEQUENCES)), tokens=(253,) * SEQUENCES)
    form, clock = StudyForm(space=space, limits=(), sequences=sequences), Clock()
    with (
        tempfile.TemporaryDirectory() as folder,
        RunDirectory.open(Path(folder) / "run", {}) as run,
    ):
        with clock.on("open"):
            log, live = StudyLog.open(run, "study", form), LiveStudy(form)
        for trial in trials_of(space, trials):
            with clock.on("ask"):
                asked = live.enqueued(trial.assignment)
                live.race(asked, None if trial.number == 0 else 0)
            with clock.on("tell"):
                live.tell(asked, trial)
            with clock.on("journal"):
                log.add(trial)
        with clock.on("go on"):
            LiveStudy(form, read_trials(run.path))
        size = (run.path / STUDY).stat().st_size
    return {**clock.spent, "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=144)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.json"))
    arguments = parser.parse_args()
    found = measure(arguments.groups, arguments.trials)
    write(
        arguments.results,
        {
            "groups": arguments.groups,
            "trials": arguments.trials,
            "seconds": found,
            **provenance(None),
        },
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
