"""The sampler outside of a search: what it proposes, and that it goes by the study alone."""

import numpy as np
import optuna
import pytest

from autoquant.errors import ConfigError, InfeasibleBudget
from autoquant.samplers import BudgetSampler
from autoquant.search.propose.shares import Effort
from autoquant.search.quiet import quietly

GROUPS = [f"layer {number}" for number in range(12)]
LABELS = ("small", "middle", "large")
CHOICES = dict.fromkeys(GROUPS, LABELS)
COSTS = {group: (2 + n % 3, 4 + n % 3, 9) for n, group in enumerate(GROUPS)}
BUDGET = 70


def worth(seed, spread):
    """What each option does: more bytes do less harm."""
    generator = np.random.default_rng(seed)
    return {
        g: tuple(sorted(np.exp(spread * generator.normal(size=3)) / (1, 4, 16), reverse=True))
        for g in GROUPS
    }


TRUE, PRIOR = worth(0, 1.0), worth(1, 1.0)


def harm(params):
    return sum(TRUE[group][LABELS.index(label)] for group, label in params.items())


def cost(params):
    return sum(COSTS[group][LABELS.index(label)] for group, label in params.items())


def sampler(**changes):
    settings = {"budget": BUDGET, "prior": PRIOR, "trials": 24, **changes}
    return BudgetSampler(CHOICES, COSTS, **settings)


def study_of(own, *earlier):
    with quietly():
        study = optuna.create_study(sampler=own)
        study.add_trials(earlier)
        return study


def objective(trial):
    return harm({group: trial.suggest_categorical(group, LABELS) for group in GROUPS})


def optimized(study, trials):
    with quietly():
        study.optimize(objective, n_trials=trials)
    return [trial.params for trial in study.trials]


def test_proposals_are_new_and_keep_and_fill_the_budget():
    found = optimized(study_of(sampler()), 24)
    assert len({tuple(params.values()) for params in found}) == 24
    for params in found:
        left = BUDGET - cost(params)
        assert left >= 0
        upgrades = [
            price - COSTS[group][LABELS.index(label)]
            for group, label in params.items()
            for price in COSTS[group][LABELS.index(label) + 1 :]
        ]
        assert left < min(upgrades)


def test_measurements_lead_beyond_what_the_prior_holds_for_best():
    """The prior is of other options: what it holds for best is far from the best."""
    found = [harm(params) for params in optimized(study_of(sampler(trials=60)), 60)]
    rng = np.random.default_rng(0)
    blind = min(
        harm(params)
        for _ in range(3000)
        if cost(params := {g: LABELS[rng.integers(3)] for g in GROUPS}) <= BUDGET
    )
    assert min(found) < 0.75 * found[0]
    assert min(found) < blind


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("stop", [0, 1, 6, 13, 17, 21])
def test_a_study_that_is_loaded_again_is_asked_the_same(together, stop):
    whole = asked(study_of(sampler(together=together)))
    assert len(whole) == 24
    again = asked(study_of(sampler(together=together), *whole[:stop]))
    assert [trial.params for trial in again] == [trial.params for trial in whole]


def asked(study):
    """Ask and tell every trial, each round told as a whole."""
    space = study.sampler.infer_relative_search_space(study, None)
    while coming := study.sampler.pending(study):
        trials = [study.ask(space) for _ in coming]
        for trial in trials:
            study.tell(trial, harm(trial.params))
    return study.trials


def test_what_is_pending_is_what_is_asked_next():
    own = sampler(together=3)
    study = study_of(own)
    space = own.infer_relative_search_space(study, None)
    coming = own.pending(study)
    assert len(coming) == 3
    assert {p.seen for p in coming} == {0}
    for left in (2, 1, 0):
        trial = study.ask(space)
        assert trial.params == own._space.params(coming[2 - left].proposal.assignment)
        if left:
            assert len(own.pending(study)) == left


def test_a_trial_that_was_enqueued_is_kept_as_it_is_and_teaches():
    study, other = study_of(sampler()), study_of(sampler())
    most = dict.fromkeys(GROUPS, "large")
    study.enqueue_trial(most)
    found, without = optimized(study, 16), optimized(other, 15)
    assert found[0] == most
    assert cost(most) > BUDGET
    assert found[1] == without[0]
    assert found[2:] != without[1:]


def test_shares_go_to_fits_refits_and_swaps_in_turn():
    own = sampler(trials=8)
    study = study_of(own)
    stages = []
    space = own.infer_relative_search_space(study, None)
    while coming := own.pending(study):
        stages.append(str(coming[0].proposal.stage))
        trial = study.ask(space)
        study.tell(trial, harm(trial.params))
    effort = Effort.of(8)
    assert stages == [
        *["runner-up"] * effort.runners_up,
        *["refit"] * effort.refit,
        *["swap"] * effort.swaps,
    ]
    with pytest.raises(ConfigError, match="is measured") as error:
        study.ask(space)
    assert "give the sampler more trials" in error.value.fix


def test_more_asks_than_a_round_has_are_refused_until_some_are_told():
    study = study_of(sampler(together=2))
    space = study.sampler.infer_relative_search_space(study, None)
    trials = [study.ask(space) for _ in range(2)]
    with pytest.raises(ConfigError, match="2 trials were asked for and are not told"):
        study.ask(space)
    for trial in trials:
        study.tell(trial, harm(trial.params))
    study.tell(2, state=optuna.trial.TrialState.FAIL)
    assert cost(study.ask(space).params) <= BUDGET


def test_a_pruned_trial_counts_by_what_it_has_more_than_the_best_on_its_steps():
    """Its last step alone is an easy one."""
    own = sampler(together=2)
    study = study_of(own)
    space = own.infer_relative_search_space(study, None)
    whole, pruned = study.ask(space), study.ask(space)
    for step, value in enumerate((4.0, 2.0, 0.5)):
        whole.report(value, step)
    for step, value in enumerate((8.0, 2.5)):
        pruned.report(value, step)
    study.tell(whole, 2.0)
    study.tell(pruned, state=optuna.trial.TrialState.PRUNED)
    own.pending(study)
    found = own._schedule._history.trials
    assert [trial.kl for trial in found] == [2.0, 2.0 + (4.0 + 0.5) / 2]
    assert [trial.is_eligible for trial in found] == [True, False]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prior": {**PRIOR, GROUPS[3]: (1.0, 0.5)}}, "prior has 2 numbers for layer 3"),
        ({"prior": {}}, "prior has 0 numbers for layer 0, which has 3 choices"),
    ],
)
def test_tables_that_do_not_match_the_choices_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        sampler(**changes)
    with pytest.raises(ConfigError, match="costs has 1 numbers for layer 0"):
        BudgetSampler(CHOICES, {**COSTS, GROUPS[0]: (1,)}, budget=BUDGET, prior=PRIOR)


def test_a_budget_that_nothing_keeps_is_refused():
    with pytest.raises(InfeasibleBudget):
        optimized(study_of(sampler(budget=3)), 1)


def test_a_parameter_that_is_no_group_is_refused():
    study = study_of(sampler())
    trial = study.ask()
    with pytest.raises(ConfigError, match="'learning rate' is no group"):
        trial.suggest_float("learning rate", 0.0, 1.0)
