"""The joint check of what is free at a choice's bits: what helps each group alone must help all."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoquant.formats import NEAREST, Choice
from autoquant.plan.assignment import Assignment
from autoquant.search.history import History
from autoquant.search.problem import Problem
from autoquant.search.propose.proposal import Named, Proposal, take
from autoquant.search.trials import Stage, Trial

CLEAR = 2.0
"""Standard errors of the paired difference of sequences beyond which a replacement is better."""


@dataclass(frozen=True)
class ScaleRules:
    """Replaces each scale rule and each rounding of the problem's optimum by the format's default,
    and proposes the optimum without those that did harm.

    Four-over-six is known to pass layer by layer and to fail as a whole (Nemotron 3 Ultra at 4.85
    bits).
    """

    problem: Problem
    """With all rules and roundings."""

    def replacements(self) -> Iterator[Named]:
        """The optimum with each of those that it uses replaced."""
        for way, default, replaced in self._replaced():
            yield f"{way} replaced by {default}", replaced

    def propose(self, history: History, count: int) -> Sequence[Proposal]:
        """The optimum without those that did harm; it and the replacements are measured."""
        optimum = self._without_harmful(history).optimum()
        return take([("optimum, rules closed", optimum)], history, count, Stage.SOLVER)

    def verdict(self, history: History) -> tuple[Problem, Trial]:
        """The problem that is searched on, and the trial of its optimum.

        All stay open if the optimum without the closed ones is worse still.

        Args:
            history: holds all that was proposed.
        """
        sound, before = self._without_harmful(history), self._optimum(history)
        if sound is not self.problem:
            after = history[sound.optimum()]
            if after.beats(before):
                return sound, after
        return self.problem, before

    def _without_harmful(self, history: History) -> Problem:
        """The problem without those whose replacement lowered the joint KL beyond its error."""
        sound, optimum = self.problem, self._optimum(history)
        for way, _, replaced in self._replaced():
            if is_clearly_better(history[replaced], optimum):
                sound = sound.without(way)
        return sound

    def _optimum(self, history: History) -> Trial:
        return history[self.problem.optimum()]

    def _replaced(self) -> Iterator[tuple[str, str, Assignment]]:
        """Yield each rule and rounding that the optimum uses, the default of its kind, and the
        optimum with that instead, wherever a legal choice has it.
        """
        optimum, legal = self.problem.optimum(), self.problem.accounting.choices
        for way, default in ways_of(self.problem).items():
            changes = {
                name: _plainer(choice, way, legal[name])
                for name, choice in optimum
                if way in (choice.scale_rule, choice.rounding)
            }
            replaced = optimum.replace(changes)
            if replaced != optimum:
                yield way, default, replaced


def ways_of(problem: Problem) -> Mapping[str, str]:
    """Every scale rule and rounding of a problem's choices, each with the default of its kind."""
    return ways_among(problem.accounting.choices.values())


def ways_among(legal: Iterable[Iterable[Choice]]) -> Mapping[str, str]:
    """The same of the choices of every group."""
    choices = [choice for own in legal for choice in own]
    ruled = [choice for choice in choices if choice.scale_rule is not None]
    known = {
        rule: c.format.scale_rules[0] or NEAREST
        for c in ruled
        for rule in c.format.scale_rules
        if rule is not None
    }
    used = {choice.scale_rule for choice in ruled}
    roundings = {c.rounding: NEAREST for c in choices if c.rounding != NEAREST}
    return {rule: default for rule, default in known.items() if rule in used} | roundings


def _plainer(choice: Choice, way: str, legal: Sequence[Choice]) -> Choice:
    """The choice without a scale rule or rounding of it, as far as that is legal."""
    if choice.scale_rule == way:
        first = replace(choice, scale_rule=choice.format.scale_rules[0])
    else:
        first = replace(choice, rounding=NEAREST)
    default = replace(first, scale_rule=choice.format.scale_rules[0], rounding=NEAREST)
    return next((plainer for plainer in (first, default) if plainer in legal), choice)


def is_clearly_better(one: Trial, other: Trial) -> bool:
    """Whether the first has the lower KL beyond the error of their paired difference.

    One sequence has no error: the lower KL decides.
    """
    if not one.beats(other) or not math.isfinite(other.kl):
        return one.beats(other)
    gains = np.array(other.sequence_kl) - np.array(one.sequence_kl)
    if len(gains) < 2:
        return True
    return bool(gains.mean() > CLEAR * gains.std(ddof=1) / math.sqrt(len(gains)))
