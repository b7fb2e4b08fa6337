"""What a result says of its budget, by its limits and by the settings of results without them."""

import pytest

from autoquant.report.words import (
    budget_note,
    budgeted,
    counts_stored_bits,
    finding,
    fitted_codes,
    polish,
    unit_of_budget,
)

RESULT = {
    "kl": {"mean": 0.125, "stderr": None},
    "baselines": [],
    "bpe": {"checkpoint": 4.75, "searched": 4.5},
    "active": {"bpe": {"checkpoint": 5.25, "searched": 5.5}},
    "checkpoint_bytes": 4096,
    "budget_bpe": 5.75,
}


@pytest.mark.parametrize(
    ("cost", "scope", "taken", "unit"),
    [
        ("bits", "checkpoint", 4.75, "bits per element"),
        ("bits", "searched", 4.5, "bits per element of the searched layers"),
        ("active-bytes", "checkpoint", 5.25, "active bits per element"),
        ("active-bytes", "searched", 5.5, "active bits per element of the searched layers"),
    ],
)
def test_a_result_without_limits_is_read_by_its_settings(cost, scope, taken, unit):
    result = RESULT | {"cost": cost, "budget_scope": scope}
    assert (budgeted(result), unit_of_budget(result)) == (taken, unit)
    is_stored = (cost, scope) == ("bits", "checkpoint")
    assert counts_stored_bits(result) == is_stored
    assert counts_stored_bits({"cost": cost, "budget_scope": scope}) == is_stored, "a signature"
    assert (budget_note(result) == "") == is_stored
    assert f"At {taken:.3f} {unit} (" in finding(result)


def test_a_result_with_limits_says_what_its_first_one_counts():
    limit = {"unit": "microseconds", "meaning": "", "is_bpe": False, "taken": 3.25}
    result = RESULT | {"cost": "bits", "budget_scope": "checkpoint", "limits": [limit]}
    assert (budgeted(result), unit_of_budget(result)) == (3.25, "microseconds")
    assert not counts_stored_bits(result)
    assert budget_note(result).endswith("the budget of 5.75 counts microseconds.")
    assert "At 3.250 microseconds (budget 5.75; the checkpoint stores 4.750" in finding(result)
    meant = [limit | {"meaning": "of one token"}]
    assert budget_note(result | {"limits": meant}).endswith("counts microseconds, of one token.")
    stored = [limit | {"is_bpe": True}]
    assert counts_stored_bits(result | {"limits": stored})


def test_the_best_of_several_recipes_within_the_budget_is_called_so():
    one = {"name": "uniform nvfp4", "kl": 0.25, "bpe": 4.5, "fits": True}
    other = one | {"name": "experts nvfp4", "kl": 0.5}
    said = finding(RESULT | {"baselines": [one, other | {"fits": False}]})
    assert said.endswith(
        "50% less than uniform nvfp4, the only fixed recipe within the budget "
        "(0.25000 at 4.500 bits)."
    )
    said = finding(RESULT | {"baselines": [other, one]})
    assert "50% less than uniform nvfp4, the best fixed recipe within" in said


def test_codes_that_were_not_fitted_are_named_by_their_reason():
    assert fitted_codes(RESULT) == fitted_codes(RESULT | {"fitted": None}) == ""
    every = {"linears": 7, "plain": {}}
    assert fitted_codes({"fitted": every}) == "7 of 7 linears have codes fitted to inputs"
    plain = {f"e.{n}": "calibration showed it no tokens" for n in range(5)} | {"o": "of harm"}
    assert fitted_codes({"fitted": {"linears": 7, "plain": plain}}) == (
        "1 of 7 linears have codes fitted to inputs; codes of the weight alone have 5 because "
        "calibration showed it no tokens (e.0, e.1, e.2, e.3, ...); 1 because of harm (o)"
    )


def test_a_polish_is_told_with_its_interval_where_there_is_one():
    found = {
        "plain": {"kl": 0.02, "stderr": 0.001},
        "polished": {"kl": 0.018, "stderr": 0.0012},
        "difference": {"mean": -0.002, "low": -0.003, "high": -0.001},
        "exported": "polished",
    }
    assert polish(RESULT) == polish(RESULT | {"polish": None}) == ""
    assert polish({"polish": found}) == (
        "KL 0.01800 ± 0.00120 with refitted codes and 0.02000 ± 0.00100 without: -0.00200, 95 % "
        "interval from -0.00300 to -0.00100; the polished assignment is exported"
    )
    unknown = {"difference": {"mean": -0.002, "low": None, "high": None}, "exported": "plain"}
    assert polish({"polish": found | unknown}) == (
        "KL 0.01800 ± 0.00120 with refitted codes and 0.02000 ± 0.00100 without: -0.00200; the "
        "plain assignment is exported"
    )
