"""The last stage before the export: finalists and recipes meet on the report tokens."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autoquant.errors import SourceError
from autoquant.measure.kl import TokenScores
from autoquant.plan.assignment import Assignment
from autoquant.run.observer import Observer
from autoquant.search.confirm import Difference, choose
from autoquant.search.history import History
from autoquant.search.trials import Stage, Trial
from autoquant.study.explore import Explored


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """Finalists and baselines on the report split."""

    candidates: tuple[Trial, ...]
    """The incumbent first: the solver's optimum, unless it overflows."""
    scores: tuple[TokenScores, ...]
    winner: int
    differences: Mapping[int, Difference]
    """Of each candidate within the budget to the first."""
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


def confirm(
    explored: Explored,
    history: History,
    *,
    finalists: int,
    score: Callable[[Sequence[Assignment]], Sequence[TokenScores]],
    noise: Callable[[], float],
    seed: int,
    observer: Observer,
) -> Confirmed:
    """Score the incumbent, its challengers and the baselines, and choose among them.

    A candidate whose KL is not finite, on the search tokens or on these, takes no part, and a
    warning says so.

    Args:
        explored: who meets.
        history: holds the baselines.
        finalists: challengers at most.
        score: assignments on the report split, in their order.
        noise: mean KL between two BF16 runs on it, nats per token.
        seed: of the resampling.
        observer: told of each score.

    Raises:
        SourceError: neither the incumbent nor a challenger has a finite KL.
    """
    invited = [explored.incumbent, *explored.challengers[:finalists]]
    baselines = [t for t in history.trials if t.stage is Stage.BASELINE and t not in invited]
    observer.stage("confirm", len(invited) + len(baselines))
    scored = _scored([*invited, *baselines], score, observer)
    met = [trial for trial, _ in scored if trial in invited]
    if not met:
        raise SourceError(
            "the KL of every finalist on the report tokens is not finite: the quantized model's "
            "output overflows.",
            fix="close the formats that overflow in the search space, or raise the budget.",
        )
    candidates = tuple(trial for trial, _ in scored)
    within = [i for i, trial in enumerate(candidates) if trial.fits]
    winner, differences = choose(
        [scored[i][1] for i in within],
        challengers=len(met) - 1,
        seed=seed,
    )
    return Confirmed(
        candidates=candidates,
        scores=tuple(scores for _, scores in scored),
        winner=within[winner],
        differences=dict(zip(within, differences, strict=True)),
        noise_floor=noise(),
    )


def _scored(
    trials: Sequence[Trial],
    score: Callable[[Sequence[Assignment]], Sequence[TokenScores]],
    observer: Observer,
) -> list[tuple[Trial, TokenScores]]:
    """Each with its scores, without those that are not finite."""
    finite = [trial for trial in trials if math.isfinite(trial.kl)]
    scores = score([trial.assignment for trial in finite]) if finite else ()
    by_number = {trial.number: own for trial, own in zip(finite, scores, strict=True)}
    found = []
    for trial in trials:
        own = by_number.get(trial.number)
        if own is not None and math.isfinite(own.mean):
            found.append((trial, own))
        else:
            observer.warn(
                f"trial {trial.number} ({trial.stage}: {trial.name}) overflows: its KL is not "
                "finite, and it takes no part in the comparison."
            )
        observer.step()
    return found
