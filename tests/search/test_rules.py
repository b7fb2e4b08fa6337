"""The joint check of scale rules, with measurements that say what each mix costs."""

from types import SimpleNamespace

import pytest
from autoquant.search.scale_check import with_sound_rules
from tiny_models import save_model

from autoquant.measure.sensitivity import Sensitivity, keys_of
from autoquant.plan.budget import Budget, Scope
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import load_space
from autoquant.search.problem import Problem
from autoquant.source.source import open_source

ALONE = {"nvfp4/max": 8.0, "nvfp4/mse": 6.0, "nvfp4/four_over_six": 7.0, "fp8": 1.0}


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """Alone, every group is best off with `mse`."""
    source = open_source(save_model("llama", tmp_path_factory.mktemp("llama") / "source"))
    plan = make_plan(source, load_space("default"))
    kl = {(group, c): ALONE[str(c)] * 1e-3 for group, c in keys_of(plan.options.choices)}
    sensitivity = Sensitivity(kl, dict.fromkeys(kl, 0.0))
    return Problem(
        accounting=plan.accounting,
        limits=(plan.limit(Budget(6.0, Scope.SEARCHED)),),
        sensitivity=sensitivity,
    )


class Measured:
    """Stands in for a ledger: joint KL by the scale rules that a mix uses."""

    def __init__(self, kl):
        self.kl = kl

    def measure(self, assignment, stage, name):
        used = {str(c).partition("/")[2] for _, c in assignment if str(c).startswith("nvfp4")}
        return SimpleNamespace(assignment=assignment, kl=self.kl["+".join(sorted(used))])


def checked(problem, **kl):
    ledger = Measured(kl)
    optimum = ledger.measure(problem.optimum(), None, "optimum")
    sound, incumbent = with_sound_rules(problem, ledger, optimum)
    return optimum, sound, incumbent


def test_a_rule_that_helps_all_groups_together_stays(problem):
    optimum, sound, incumbent = checked(problem, mse=0.5, max=0.6)
    assert sound is problem
    assert incumbent is optimum


def test_a_rule_that_harms_all_groups_together_is_closed(problem):
    _, sound, incumbent = checked(problem, mse=0.5, max=0.4, four_over_six=0.45)
    assert "nvfp4/mse" not in {str(choice) for _, choice in incumbent.assignment}
    assert sound.allows(incumbent.assignment)
    assert incumbent.kl == 0.45


def test_no_rule_is_closed_where_the_next_best_mix_is_worse_still(problem):
    optimum, sound, incumbent = checked(problem, mse=0.5, max=0.4, four_over_six=0.55)
    assert sound is problem
    assert incumbent is optimum
