"""What stages measured, took and gained."""

from types import SimpleNamespace

import pytest

from autoquant.search.stage_table import stage_table


def trial(stage, kl, *, is_eligible=True, is_stopped=False):
    return SimpleNamespace(
        stage=stage, kl=kl, is_eligible=is_eligible, is_stopped=is_stopped, tokens=10, seconds=0.5
    )


def test_a_stage_that_comes_back_has_one_row_and_gains_add_up():
    rows = stage_table(
        [
            trial("baseline", 0.1, is_eligible=False),
            trial("baseline", 8.0),
            trial("baseline", 6.0),
            trial("solver", 4.0),
            trial("rules", 5.0),
            trial("solver", 3.0),
            trial("swap", 2.0, is_eligible=False, is_stopped=True),
        ]
    )
    counts = [(r["stage"], r["trials"], r["stopped"], r["tokens"], r["seconds"]) for r in rows]
    assert counts == [
        ("baseline", 3, 0, 30, 1.5),
        ("solver", 2, 0, 20, 1.0),
        ("rules", 1, 0, 10, 0.5),
        ("swap", 1, 1, 10, 0.5),
    ]
    assert [r["best_kl"] for r in rows] == [6.0, 3.0, 5.0, None]
    assert [r["gain"] for r in rows] == [None, pytest.approx(0.5), 0.0, 0.0]


def test_a_gain_is_the_share_by_which_the_least_kl_fell():
    rows = stage_table([trial("baseline", 6.0), trial("solver", 4.0), trial("swap", 4.0)])
    assert [r["gain"] for r in rows] == [None, pytest.approx(1 / 3), 0.0]


def test_the_first_that_may_win_has_nothing_to_gain_on():
    rows = stage_table([trial("baseline", 1.0, is_eligible=False), trial("solver", 5.0)])
    assert [r["gain"] for r in rows] == [0.0, None]
    assert stage_table([]) == []
