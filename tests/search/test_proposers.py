"""What each proposer proposes, from histories that say what whole candidates cost."""

import dataclasses

import numpy as np
import pytest
from joint import FREE, SPLIT, Scored, driver_of, summed

from autoquant.formats import ScaleRule
from autoquant.measure.racing.local import LocalEvaluator
from autoquant.plan.assignment import Assignment
from autoquant.search.history import History
from autoquant.search.predictor import Predictor, ranked
from autoquant.search.propose.predicted import REFIT_EVERY, Refits, RunnersUp
from autoquant.search.propose.proposal import Listed, take
from autoquant.search.propose.reweight import ASKS_PER_TRIAL, Reweightings
from autoquant.search.propose.swaps import Swaps
from autoquant.search.trials import Stage
from autoquant.study.sampling import OPTUNAS


def weights(problem, trials):
    return Reweightings(problem, trials=trials, seed=0, sampler=OPTUNAS["tpe"])


PROPOSERS = {
    "runners_up": RunnersUp,
    "reweight": lambda predictor: weights(predictor.problem, 20),
    "refit": Refits,
    "swaps": Swaps,
}


@pytest.fixture
def problem(small):
    return small(uneven=1.0)


def begun(problem, joint=None, *more):
    """A driver whose history holds the optimum and `more`."""
    driver = driver_of(problem, joint or summed(problem))
    found = [("optimum", problem.optimum()), *((f"more {i}", a) for i, a in enumerate(more))]
    driver.run(Listed(Stage.SOLVER, iter(found)))
    return driver


def is_filled(problem, assignment):
    selection = problem.selection(assignment)
    return problem.knapsack.fill(selection) == selection


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("name", PROPOSERS)
def test_proposals_are_new_distinct_and_fill_the_budget(problem, name, width):
    driver, proposer = begun(problem), PROPOSERS[name](Predictor(problem))
    for _ in range(4):
        proposed = proposer.propose(driver.history, width)
        assert 1 <= len(proposed) <= width
        assert len({p.assignment.digest for p in proposed}) == len(proposed)
        for proposal in proposed:
            assert proposal.assignment not in driver.history
            assert problem.fits(proposal.assignment)
            assert is_filled(problem, proposal.assignment)
            assert proposal.rival is driver.history.best()
        driver.run(Listed(Stage.SWAP, iter([(p.name, p.assignment) for p in proposed])))


@pytest.mark.parametrize("name", PROPOSERS)
def test_the_same_history_is_answered_the_same(problem, name):
    driver = begun(problem)
    one, other = (PROPOSERS[name](Predictor(problem)).propose(driver.history, 5) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("name", PROPOSERS)
def test_a_closed_scale_rule_is_proposed_by_nobody(problem, name):
    """The best so far uses the rule that the joint check has closed since."""
    sound = problem.without(ScaleRule.MSE)
    driver = begun(problem, summed(problem, noise=0.0), sound.optimum())
    best = driver.history.best()
    assert best is not None
    assert best.assignment == problem.optimum()
    assert not sound.allows(best.assignment)
    driver.run(PROPOSERS[name](Predictor(sound)), most=4, bounds=FREE)
    proposed = driver.history.trials[2:]
    assert len(proposed) == 4
    assert all(sound.allows(trial.assignment) and trial.fits for trial in proposed)


def test_runners_up_follow_one_fit(problem):
    driver, predictor = begun(problem), Predictor(problem)
    order = ranked(predictor.fitted(driver.history), problem)
    driver.run(RunnersUp(predictor), most=6)
    trials = driver.history.trials[1:]
    assert [predictor.selection(t) for t in trials] == [
        s for s in order if problem.decode(s) != problem.optimum()
    ][:6]
    names = [f"rank {1 + order.index(predictor.selection(t))}" for t in trials]
    assert [t.name for t in trials] == names


@pytest.mark.parametrize("width", [1, 2, 7])
def test_refits_fit_again_after_every_few(problem, monkeypatch, width):
    fitted_on = []
    original = Predictor.refitted

    def refitted(self, history):
        fitted_on.append(len(history.trials))
        return original(self, history)

    monkeypatch.setattr(Predictor, "refitted", refitted)
    driver = dataclasses.replace(begun(problem), width=width)
    driver.run(Refits(Predictor(problem)), most=2 * REFIT_EVERY + 1)
    assert fitted_on == [1, 1 + REFIT_EVERY, 1 + 2 * REFIT_EVERY]
    assert len(driver.history.trials) == 2 + 2 * REFIT_EVERY


def test_refits_end_where_everything_is_measured(small):
    problem = small(bpe=5.0).without(ScaleRule.MSE).without(ScaleRule.FOUR_OVER_SIX)
    driver = begun(problem)
    assert driver.run(Refits(Predictor(problem)), most=1000)
    everything = {problem.decode(s).digest for s in ranked(Predictor(problem).surrogate, problem)}
    assert len(everything) > 2 * REFIT_EVERY
    assert {t.assignment.digest for t in driver.history.trials} >= everything
    assert len(driver.history.trials) < 1000


@pytest.mark.parametrize("made", [RunnersUp, Refits, Swaps])
def test_what_is_ahead_is_what_is_proposed_if_nothing_changes(problem, made):
    driver, proposer = begun(problem, summed(problem, noise=0.0)), made(Predictor(problem))
    assert list(proposer.ahead(driver.history, 3)) == [], "nobody has asked"
    driver.run(proposer, most=1)
    ahead = list(proposer.ahead(driver.history, 3))
    assert ahead == list(proposer.ahead(driver.history, 3)), "none of them is taken"
    before = driver.history.trials
    driver.run(proposer, most=3)
    assert [trial.assignment for trial in driver.history.trials[len(before) :]] == ahead


def test_what_is_ahead_ends_where_measurements_decide(problem):
    driver, proposer = begun(problem), Refits(Predictor(problem))
    driver.run(proposer, most=2)
    assert len(proposer.ahead(driver.history, 100)) == REFIT_EVERY - 2


def test_swaps_go_on_around_a_better_neighbour(problem):
    """One group is misjudged: whatever changes it is better."""
    first = problem.optimum()
    group = next(name for name, choice in first if choice.scale_rule == ScaleRule.MSE)

    def joint(assignment):
        return problem.predicted(assignment) * (1.0 if assignment[group] == first[group] else 0.5)

    driver, proposer = begun(problem, joint), Swaps(Predictor(problem))
    assert proposer.propose(driver.history, 1)[0].rival is driver.history[first]
    driver.run(proposer, most=12)
    best = driver.history.best()
    assert best is not None
    assert best.assignment[group] != first[group]
    proposed = proposer.propose(driver.history, 5)
    assert all(proposal.rival is best for proposal in proposed)
    assert all(proposal.assignment[group] != first[group] for proposal in proposed)


def test_swaps_race_the_best_that_the_problem_allows(problem):
    sound = problem.without(ScaleRule.MSE)
    driver = begun(problem, summed(problem, noise=0.0), sound.optimum())
    (proposal,) = Swaps(Predictor(sound)).propose(driver.history, 1)
    assert proposal.rival is driver.history[sound.optimum()]


def test_swaps_have_no_centre_where_nothing_may_win(problem):
    driver = begun(problem, lambda _: float("nan"))
    assert Swaps(Predictor(problem)).propose(driver.history, 3) == ()


def test_swaps_come_in_predicted_order(problem):
    driver, predictor = begun(problem), Predictor(problem)
    proposed = Swaps(predictor).propose(driver.history, 30)
    fitted = predictor.refitted(driver.history)
    predicted = fitted.predict([problem.selection(p.assignment) for p in proposed])
    assert (np.diff(predicted) >= 0.0).all()


@pytest.mark.slow
def test_optuna_learns_from_what_is_measured(problem):
    """What it asks for after its random start follows from the KL that it was told."""

    def asked(joint):
        driver = begun(problem, joint)
        driver.run(weights(problem, 30), most=30)
        return [t.params for t in driver.history.trials[1:]]

    one, other = asked(summed(problem)), asked(lambda a: 1.0 / problem.predicted(a))
    assert one[:5] == other[:5]
    assert one != other


def test_optuna_ends_some_time(small):
    """All groups alike: most reweightings decode to what is known."""
    problem = small()
    proposer = weights(problem, 2)
    driver = begun(problem)
    driver.run(proposer)
    assert len(driver.history.trials) <= 1 + 2 * ASKS_PER_TRIAL
    assert proposer.propose(driver.history, 1) == []


def test_optuna_goes_on_after_a_candidate_that_overflows(problem):
    driver = begun(problem)
    failing = dataclasses.replace(
        driver, evaluator=LocalEvaluator(Scored(lambda _: float("nan")), SPLIT)
    )
    proposer = weights(problem, 4)
    failing.run(proposer, most=2)
    driver.run(proposer, most=2)
    assert [np.isfinite(t.kl) for t in driver.history.trials] == [True, False, False, True, True]


def test_what_is_taken_is_no_more_than_asked_for(problem):
    history = History()
    candidates = iter(
        [("a", problem.optimum()), ("again", problem.optimum()), ("b", Assignment.of({}))]
    )
    assert take(candidates, history, 0, Stage.SOLVER) == []
    (first,) = take(candidates, history, 1, Stage.SOLVER)
    assert (first.name, first.stage, first.rival) == ("a", Stage.SOLVER, None)
    assert [p.name for p in take(candidates, history, 5, Stage.SOLVER)] == ["again", "b"]
