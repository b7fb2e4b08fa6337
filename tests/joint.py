"""Problems of a small real model, and measurements that say what whole candidates cost."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from optuna.samplers import BaseSampler
from tiny_models import save_model

from autoquant.data.tokens import Split
from autoquant.measure.evaluator import Evaluator
from autoquant.measure.interactions import Interactions
from autoquant.measure.kl import TokenKl
from autoquant.measure.racing.local import LocalEvaluator
from autoquant.measure.sensitivity import Sensitivity, keys_of
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Budget, Scope
from autoquant.plan.limit import Limit
from autoquant.plan.model_costs import StoredBytes
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import load_space, parse_space
from autoquant.samplers import BudgetSampler
from autoquant.samplers.schedule import Schedule
from autoquant.search.history import History
from autoquant.search.limits import Bounds
from autoquant.search.predictor import Predictor
from autoquant.search.problem import Problem
from autoquant.search.propose.proposal import Listed
from autoquant.search.propose.shares import Effort, shared_out
from autoquant.search.trials import Stage, Trial
from autoquant.source.source import open_source
from autoquant.study.driver import Driver
from autoquant.study.explore import Explored, explore
from autoquant.study.live import LiveStudy
from autoquant.study.record import Sequences, StudyForm
from autoquant.study.sampling import sampler_of
from autoquant.study.space import StudySpace

HARM = {"nvfp4/max": 8.0, "nvfp4/mse": 6.0, "nvfp4/four_over_six": 7.0, "fp8": 1.0, "bf16": 0.0}
"""Milli-nats of a group by its choice."""

SPLIT = Split.unrelated("search", tuple(torch.zeros(4, 8, 32, dtype=torch.int64)), "four of eight")

Joint = Callable[[Assignment], float]
"""Mean KL of a whole assignment, nats per token."""


def small_problem(folder: Path, *, uneven: float = 0.0, bpe: float = 6.0) -> Problem:
    """The problem of a model of four layers.

    Args:
        folder: for the model; made where absent.
        uneven: deviation of the logarithms of the groups' weights; 0 makes them all alike.
        bpe: budget of the open groups.
    """
    if not folder.exists():
        save_model("llama", folder, num_hidden_layers=4)
    plan = make_plan(open_source(folder), load_space("default"))
    generator = np.random.default_rng(0)
    weights = {g.name: math.exp(uneven * generator.normal()) for g in plan.groups}
    kl = {
        (group, choice): HARM[str(choice)] * 1e-3 * weights[group]
        for group, choice in keys_of(plan.options.choices)
    }
    return Problem(
        accounting=plan.accounting,
        limits=(plan.limit(Budget(bpe, Scope.SEARCHED)),),
        sensitivity=Sensitivity(kl, dict.fromkeys(kl, 0.0)),
    )


def with_space(problem: Problem, space: str, harm: Mapping[str, float]) -> Problem:
    """A problem's model under another space, YAML, every group in milli-nats by its choice."""
    groups = problem.accounting.groups
    choices = parse_space(space, "space.yaml").options(groups).choices
    accounting = replace(problem.accounting, choices=choices)
    kl = {key: harm[str(key[1])] * 1e-3 for key in keys_of(choices)}
    (limit,) = problem.limits
    cost = StoredBytes(accounting=accounting, scope=Scope.SEARCHED)
    return Problem(
        accounting=accounting,
        limits=(Limit.of(cost, limit.asked),),
        sensitivity=Sensitivity(kl, dict.fromkeys(kl, 0.0)),
    )


def interacting(problem: Problem) -> Problem:
    """The problem with correlations of random directions between all options."""
    directions = np.random.default_rng(0).normal(size=(len(problem.keys), 4))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    interactions = Interactions(problem.keys, directions @ directions.T)
    return replace(problem, sensitivity=replace(problem.sensitivity, interactions=interactions))


def summed(problem: Problem, *, noise: float = 0.05) -> Joint:
    """The sum of the groups' own KL, off by a share that follows from the assignment."""

    def kl(assignment: Assignment) -> float:
        own = np.random.default_rng(int(assignment.digest, 16))
        return problem.predicted(assignment) * math.exp(noise * own.normal())

    return kl


class Scored:
    """Scores batches as `Scorer` does, from the joint KL alone.

    Sequences are hard or easy for all candidates alike, as those of a text are.
    """

    def __init__(self, joint: Joint) -> None:
        self.joint = joint
        self.batches: list[tuple[str, int]] = []
        """Digest and batch of every call."""

    def waves(
        self, split: Split, batches: Sequence[int], *, forwards: int
    ) -> Iterator[Sequence[int]]:
        return ([index] for index in batches)

    def score_batches(
        self, assignments: Sequence[Sequence[Assignment]], split: Split, batches: Sequence[int]
    ) -> list[list[TokenKl]]:
        return [
            [self.score_batch(assignment, split, index) for assignment in own]
            for index, own in zip(batches, assignments, strict=True)
        ]

    def score_batch(self, assignment: Assignment, split: Split, index: int) -> TokenKl:
        self.batches.append((assignment.digest, index))
        rows, length = split.batches[index].shape
        hard = np.random.default_rng(index).uniform(0.5, 1.5, rows)
        hard *= rows / hard.sum()
        return TokenKl(
            kl=np.repeat(hard * self.joint(assignment), length),
            sequence=np.repeat(np.arange(rows), length),
            unit=split.units[index],
        )


def form_of(problem: Problem) -> StudyForm:
    return StudyForm(
        space=StudySpace.of(problem.accounting),
        limits=problem.limits,
        sequences=Sequences.of(SPLIT),
    )


def driver_of(
    problem: Problem,
    joint: Joint,
    *,
    earlier: Sequence[Trial] = (),
    elsewhere: Iterable[Trial] = (),
    keep: Callable[[Trial], None] = lambda _: None,
    evaluator: Evaluator | None = None,
    width: int = 1,
) -> Driver:
    return Driver(
        study=LiveStudy(form_of(problem), earlier),
        history=History(earlier, elsewhere),
        evaluator=evaluator or LocalEvaluator(Scored(joint), SPLIT),
        accounting=problem.accounting,
        fits=problem.fits,
        keep=keep,
        width=width,
    )


FREE = Bounds(lambda: True)


def explored(
    problem: Problem,
    driver: Driver,
    trials: int,
    bounds: Bounds = FREE,
    *,
    effort: Effort | None = None,
    sampler: str = "budget",
) -> Explored:
    """Explore with so many trials of a sampler, or with our own under another effort."""

    def made(predictor: Predictor) -> BaseSampler:
        space, width = driver.study.form.space, driver.width
        if effort is not None:
            shares = partial(shared_out, predictor, effort)
            return BudgetSampler.by(predictor.problem, space, lambda: Schedule(shares(), width))
        return sampler_of(sampler, predictor, space, trials=trials, width=width, seed=0)

    return explore(
        problem, driver, made, trials=trials, bounds=bounds, timed=lambda _: nullcontext()
    )


def solved(problem: Problem, count: int) -> list[Trial]:
    """The trials of the solver's best assignments, measured one after the other."""
    driver = driver_of(problem, summed(problem))
    named = [(f"number {i}", problem.decode(s)) for i, s in enumerate(problem.knapsack.best(count))]
    driver.run(Listed(Stage.SOLVER, iter(named)))
    return list(driver.history.trials)
