"""The joint check of scale rules: what helps each group alone must help all of them together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from autoquant.formats import ScaleRule
from autoquant.plan.assignment import Assignment
from autoquant.search.history import History
from autoquant.search.problem import Problem
from autoquant.search.propose.proposal import Proposal, take
from autoquant.search.trials import Stage, Trial


@dataclass(frozen=True)
class ScaleRules:
    """Proposes the problem's optimum with each scale rule replaced by `max`, and then the optimum
    without the rules that did harm.

    Four-over-six is known to pass layer by layer and to fail as a whole (Nemotron 3 Ultra at 4.85
    bits).
    """

    problem: Problem
    """With all rules; its optimum is measured."""

    def propose(self, history: History, count: int) -> Sequence[Proposal]:
        replaced = ((f"{rule} replaced by max", other) for rule, other in self._replaced())
        found = take(replaced, history, count, Stage.RULES)
        if not found:
            optimum = self._without_harmful(history).optimum()
            found = take([("optimum, sound rules only", optimum)], history, count, Stage.SOLVER)
        return found

    def verdict(self, history: History) -> tuple[Problem, Trial]:
        """The problem that is searched on, and the trial of its optimum.

        All rules stay open if the optimum without the closed ones is worse still.

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
        """The problem without the rules whose replacement by `max` lowered the joint KL."""
        sound, optimum = self.problem, self._optimum(history)
        for rule, replaced in self._replaced():
            if history[replaced].beats(optimum):
                sound = sound.without(rule)
        return sound

    def _optimum(self, history: History) -> Trial:
        return history[self.problem.optimum()]

    def _replaced(self) -> Iterator[tuple[str, Assignment]]:
        """Yield each rule that the optimum uses, and the optimum with the format's default instead,
        wherever that is legal.
        """
        optimum, legal = self.problem.optimum(), self.problem.accounting.choices
        for rule in ScaleRule:
            changes = {
                name: replace(choice, scale_rule=choice.format.scale_rules[0])
                for name, choice in optimum
                if choice.scale_rule == rule
            }
            replaced = optimum.replace({n: c for n, c in changes.items() if c in legal[n]})
            if replaced != optimum:
                yield rule, replaced
