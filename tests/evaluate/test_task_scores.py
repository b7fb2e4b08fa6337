"""Figures of tasks, item by item, and how two assignments differ on the same items."""

import math

import numpy as np
import pytest

from autoquant.errors import SourceError
from autoquant.evaluate.evaluated import Candidate, Evaluation
from autoquant.evaluate.scores import Metric, TaskScore, paired_difference, rows_of


def score_of(name, items, *, task="words", digest="d", metric="acc"):
    own = Metric(
        name=metric,
        value=float(np.mean(items)),
        higher_is_better=True,
        items=tuple(map(float, items)),
    )
    return TaskScore(
        name=name,
        assignment=f"{name}-digest",
        task=task,
        items=len(items),
        digest=digest,
        shots=0,
        metrics=(own,),
    )


def test_the_interval_is_that_of_the_differences_item_by_item():
    ours, theirs = [1, 0, 1, 1, 0, 1, 0, 1], [1, 1, 0, 1, 0, 1, 1, 1]
    found = paired_difference(ours, theirs)
    differences = np.subtract(ours, theirs)
    half = 1.959964 * differences.std(ddof=1) / math.sqrt(8)
    assert found.mean == pytest.approx(-0.125)
    assert (found.low, found.high) == pytest.approx((-0.125 - half, -0.125 + half))


def test_items_that_both_answer_alike_leave_no_doubt():
    found = paired_difference([1, 0, 1, 0], [1, 0, 1, 0])
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits, draws = 0, 2000
    for _ in range(draws):
        hard = generator.random(200)
        ours, theirs = (generator.random(200) < 0.8 * hard, generator.random(200) < 0.7 * hard)
        found = paired_difference(ours.astype(float), theirs.astype(float))
        hits += found.low <= 0.05 <= found.high
    assert 0.93 < hits / draws < 0.97


def test_one_item_has_no_interval():
    assert paired_difference([1], [0]) is None
    assert score_of("bf16", [1]).metrics[0].stderr is None


def test_the_standard_error_is_of_the_mean_over_items():
    assert score_of("a", [1, 0, 0, 1]).metrics[0].stderr == pytest.approx(
        np.std([1, 0, 0, 1], ddof=1) / 2
    )


def test_only_scores_on_the_same_items_are_compared():
    scores = [
        score_of("bf16", [1, 1, 0]),
        score_of("winner", [1, 0, 0]),
        score_of("winner", [1, 0], digest="fewer"),
        score_of("winner", [1, 0, 0], task="other"),
    ]
    rows = rows_of(scores, "bf16")
    compared = {(r.score.name, r.score.task, r.score.digest): r.to_base for r in rows}
    assert compared["winner", "words", "d"].mean == pytest.approx(-1 / 3)
    others = {key: found for key, found in compared.items() if key != ("winner", "words", "d")}
    assert set(others.values()) == {None}
    assert len(rows) == 4


def evaluation(*scores):
    candidate = Candidate(name="winner", digest="winner-digest", bpe=5.0, kl=0.1, stderr=None)
    return Evaluation(model="m", target="blackwell", candidates=(candidate,), scores=scores)


def test_an_evaluation_reads_back_from_its_json():
    found = evaluation(score_of("winner", [1, 0, 1]))
    assert Evaluation.of(found.to_dict(), "file") == found


def test_what_is_measured_again_takes_the_place_of_the_old():
    old = evaluation(score_of("winner", [0, 0]), score_of("winner", [1, 1], task="other"))
    whole = old.with_(evaluation(score_of("winner", [1, 0])))
    assert [s.metrics[0].value for s in whole.scores] == [0.5, 1.0]


@pytest.mark.parametrize("part", ["scores", "candidates", "model"])
def test_a_damaged_file_is_named(part):
    data = evaluation(score_of("winner", [1])).to_dict()
    del data[part]
    with pytest.raises(SourceError, match="run/evaluation is damaged"):
        Evaluation.of(data, "run/evaluation")


def test_a_score_without_its_items_is_damaged():
    data = evaluation(score_of("winner", [1])).to_dict()
    del data["scores"][0]["metrics"][0]["items"]
    with pytest.raises(SourceError, match="is damaged"):
        Evaluation.of(data, "file")
