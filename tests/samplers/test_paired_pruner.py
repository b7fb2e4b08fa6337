"""The pruner: who loses to whom, on which items, and that the search's race is the same rule."""

import numpy as np
import optuna
import pytest

from autoquant.measure.kl import TokenKl
from autoquant.measure.race import Race
from autoquant.samplers import PairedPruner
from autoquant.search.quiet import quietly

ITEMS = 24
HARD = np.random.default_rng(0).uniform(0.5, 1.5, ITEMS)


def study_of(pruner):
    with quietly():
        return optuna.create_study(pruner=pruner)


def measured(study, values, *, constraint=None, **attributes):
    """A whole trial with these values of the items."""
    trial = study.ask()
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    for step, value in enumerate(values):
        trial.report(value, step)
    if constraint is not None:
        trial.set_constraint("bytes", constraint)
    study.tell(trial, float(np.mean(values)))


def raced(study, values, **attributes):
    """The items that a trial reports before it is stopped."""
    trial = study.ask()
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    for step, value in enumerate(values):
        trial.report(float(value), step)
        if trial.should_prune():
            return step + 1
    return len(values)


def noisy(level, seed, spread=0.05):
    return HARD * level * np.exp(spread * np.random.default_rng(seed).normal(size=ITEMS))


def test_who_is_clearly_worse_stops_after_the_fewest_items_and_equals_do_not():
    study = study_of(PairedPruner())
    measured(study, noisy(1.0, 1))
    assert raced(study, noisy(1.5, 2)) == 8
    assert raced(study, noisy(1.0, 3)) == ITEMS
    assert raced(study, noisy(0.5, 4)) == ITEMS


def test_hard_items_are_hard_for_both():
    """Unpaired, the spread of the items would hide the difference."""
    study = study_of(PairedPruner())
    measured(study, HARD)
    assert raced(study, HARD * 1.03) < ITEMS
    assert 0.03 * HARD.mean() < 3 * HARD.std() / np.sqrt(8)


def test_without_a_rival_nothing_stops():
    assert raced(study_of(PairedPruner()), noisy(9.0, 0)) == ITEMS


def test_the_rival_is_the_best_within_the_constraints():
    study = study_of(PairedPruner())
    measured(study, noisy(0.1, 1), constraint=5.0)
    measured(study, noisy(2.0, 2), constraint=-1.0)
    assert raced(study, noisy(2.0, 3)) == ITEMS
    measured(study, noisy(1.0, 4), constraint=0.0)
    assert raced(study, noisy(2.0, 3)) == 8


def test_a_stopped_trial_that_was_told_its_estimate_is_nobodys_rival():
    study = study_of(PairedPruner())
    measured(study, noisy(1.0, 1))
    measured(study, noisy(0.1, 2), is_stopped=True)
    assert raced(study, noisy(1.0, 3)) == ITEMS


def test_a_trial_may_name_its_rival_or_none():
    study = study_of(PairedPruner())
    measured(study, noisy(2.0, 1))
    measured(study, noisy(1.0, 2))
    assert raced(study, noisy(2.0, 3), rival=0) == ITEMS
    assert raced(study, noisy(2.0, 3), rival=1) == 8
    assert raced(study, noisy(9.0, 3), rival=None) == ITEMS


def test_items_of_one_document_are_one_unit():
    study = study_of(PairedPruner(unit=[step // 2 for step in range(ITEMS)]))
    measured(study, noisy(1.0, 1))
    assert raced(study, noisy(1.5, 2)) == 15  # the first of the eighth document's


@pytest.mark.parametrize("seed", range(12))
def test_the_search_and_the_pruner_stop_at_the_same_item(seed):
    """`Race` goes by the tokens of sequences, the pruner by what was reported of them."""
    generator = np.random.default_rng(seed)
    unit, sizes = np.sort(generator.integers(0, 14, ITEMS)), generator.integers(3, 9, ITEMS)
    rival, own = noisy(1.0, seed), noisy(1.04, seed + 100)
    study = study_of(PairedPruner([*map(int, unit)], [*map(float, sizes)]))
    scores = [
        TokenKl(
            kl=np.repeat(own[:n], sizes[:n]),
            sequence=np.repeat(np.arange(n), sizes[:n]),
            unit=unit[:n],
        )
        for n in range(1, ITEMS + 1)
    ]
    means = [float(kl) for kl in scores[-1].by_sequence()]
    measured(study, rival)
    race = Race(rival=tuple(map(float, rival)))
    stopped = next((n for n, s in enumerate(scores, start=1) if race.lost(s)), ITEMS)
    assert raced(study, means) == stopped
    frozen = study.trials[-1]
    assert study.pruner.race(study, frozen) == race
