"""The joint check of scale rules: what helps each group alone must help all of them together."""

from autoquant.formats import NVFP4, Choice, Format, ScaleRule
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


def _replaced(problem: Problem, assignment: Assignment, rule: ScaleRule) -> Assignment:
    wanted, legal = Choice(Format.NVFP4, rule), problem.accounting.choices
    return assignment.replace(
        {name: NVFP4 for name, c in assignment if c == wanted and NVFP4 in legal[name]}
    )
