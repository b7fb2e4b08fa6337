"""The joint check of scale rules: what helps each group alone must help all of them together."""

from dataclasses import replace

from autoquant.formats import ScaleRule
from autoquant.plan.assignment import Assignment
from autoquant.search.problem import Problem
from autoquant.search.trials import Ledger, Stage, Trial


def with_sound_rules(problem: Problem, ledger: Ledger, optimum: Trial) -> tuple[Problem, Trial]:
    """The problem without the scale rules that make its optimum worse, and its optimum.

    Each rule in turn is replaced by `max` in the optimum; where that has the lower joint KL, the
    rule is closed. Four-over-six is known to pass layer by layer and to fail as a whole (Nemotron 3
    Ultra at 4.85 bits). All rules stay open if the optimum without the closed ones is worse still.

    Args:
        problem: with all rules.
        ledger: measures.
        optimum: of `problem`.
    """
    sound = problem
    for rule in ScaleRule:
        replaced = _replaced(problem, optimum.assignment, rule)
        if replaced != optimum.assignment:
            after = ledger.measure(replaced, Stage.RULES, f"{rule} replaced by max")
            if after.kl < optimum.kl:
                sound = sound.without(rule)
    if sound is problem:
        return problem, optimum
    solved = ledger.measure(sound.optimum(), Stage.SOLVER, "optimum, sound rules only")
    return (sound, solved) if solved.kl < optimum.kl else (problem, optimum)


def _replaced(problem: Problem, assignment: Assignment, rule: str) -> Assignment:
    """Every choice of a scale rule under its format's default instead, where that is legal."""
    changes = {
        name: replace(choice, scale_rule=choice.format.scale_rules[0])
        for name, choice in assignment
        if choice.scale_rule == rule
    }
    legal = problem.accounting.choices
    return assignment.replace({name: c for name, c in changes.items() if c in legal[name]})
