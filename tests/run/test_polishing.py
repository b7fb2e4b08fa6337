"""Which of a winner and its polish is exported, and which assignments have one."""

import json
import math
from types import SimpleNamespace

import pytest

from autoquant.errors import ConfigError, RunConflict
from autoquant.formats import Choice
from autoquant.plan.assignment import Assignment
from autoquant.run import polishing
from autoquant.run.config import SearchConfig
from autoquant.run.polishing import (
    Winner,
    polished_assignment,
    polished_winner,
    require_codes,
)
from autoquant.run.signature import NUMERICS_VERSION
from autoquant.search.confirm import Difference
from autoquant.store.run_directory import ASSIGNMENT, IDENTITY, RESULT, write_json


def assignment(*choices):
    return Assignment.of({str(n): Choice.parse(text) for n, text in enumerate(choices)})


def scores(kl):
    return SimpleNamespace(mean=kl, stderr=lambda: 0.1)


def test_formats_scale_rules_and_inputs_stay():
    found = polished_assignment(
        assignment(
            *("nvfp4/mse/gptq", "nvfp4/max", "nvfp4/hessian/gptq/a16"),
            *("fp8", "fp8/gptq", "fp8/cast", "bf16"),
        )
    )
    assert [str(choice) for _, choice in found] == [
        "nvfp4/mse/refit",
        "nvfp4/max/refit",
        "nvfp4/hessian/refit/a16",
        "fp8/refit",
        "fp8/refit",
        "fp8/cast",
        "bf16",
    ]


@pytest.fixture
def polished(monkeypatch):
    """The better of a winner and its polish, from what measuring both says."""
    monkeypatch.setattr(polishing, "polish_key", lambda *_: "key")
    monkeypatch.setattr(polishing, "make_polish", lambda *_: None)

    def run(plain, kl, high=math.nan):
        difference = Difference(mean=kl - 1.0, low=-1.0, high=high)
        monkeypatch.setattr(polishing, "paired_difference", lambda *_, **__: difference)
        warnings = []
        found = polished_winner(
            None,
            Winner(assignment=plain, scores=scores(1.0)),
            None,
            score=lambda _: scores(kl),
            seed=0,
            observer=SimpleNamespace(warn=warnings.append),
        )
        return found, warnings

    return run


@pytest.mark.parametrize(("high", "won"), [(-0.1, True), (0.1, False), (math.nan, False)])
def test_the_polish_wins_beyond_the_interval_alone(polished, high, won):
    plain = assignment("nvfp4/mse/gptq")
    found, _ = polished(plain, 0.9, high)
    assert found.assignment == (assignment("nvfp4/mse/refit") if won else plain)
    assert found.scores.mean == (0.9 if won else 1.0)
    said = found.polish.to_dict()
    assert said["exported"] == ("polished" if won else "plain")
    assert (said["plain"]["kl"], said["polished"]["kl"]) == (1.0, 0.9)


def test_nothing_to_polish_and_a_polish_that_overflows_leave_the_winner(polished):
    found, warnings = polished(assignment("fp8/cast", "bf16"), 0.9, -0.1)
    assert found.polish is None
    assert not warnings
    found, warnings = polished(assignment("nvfp4/max"), math.inf, -0.1)
    assert found.polish is None
    assert found.scores.mean == 1.0
    assert "overflows" in warnings[0]


def require(assignment, run, **result):
    """With what the result of a run says, whose winner this is."""
    if run is not None:
        run.mkdir(exist_ok=True)
        write_json(run, RESULT, {"polish": None} | result)
        winner = {"schema_version": 1, "groups": {"0": "fp8/gptq", "1": "nvfp4/mse", "2": "bf16"}}
        (run / ASSIGNMENT).write_text(json.dumps(winner))
    require_codes(assignment, run)


def test_refitted_codes_are_those_of_the_winner_that_they_were_made_for(tmp_path):
    run, polish = tmp_path / "run", {"key": "key"}
    own = assignment("fp8/refit", "nvfp4/mse/refit")
    require(own, run, polish=polish)
    for anything in (None, run):
        require(assignment("fp8/gptq", "bf16"), anything)
    for missing in (None, run):
        with pytest.raises(ConfigError, match="0: fp8/refit") as refused:
            require(own, missing)
        assert "gptq for refit" in refused.value.fix
    for other in (("fp8/refit", "fp8/refit"), ("fp8/refit",), ("fp8/gptq", "nvfp4/mse/refit")):
        with pytest.raises(ConfigError, match=r"is another: \d is") as refused:
            require(assignment(*other), run, polish=polish)
        assert str(run / ASSIGNMENT) in refused.value.fix


def test_fitted_codes_of_other_numerics_are_not_made_again_otherwise(tmp_path):
    for numerics in (NUMERICS_VERSION, NUMERICS_VERSION - 1, None):
        signature = {} if numerics is None else {"numerics": numerics}
        write_json(tmp_path, IDENTITY, {"signature": signature, "status": "finished"})
        require_codes(assignment("fp8", "nvfp4/mse", "bf16"), tmp_path)
        if numerics == NUMERICS_VERSION:
            require_codes(assignment("fp8/gptq"), tmp_path)
            continue
        with pytest.raises(RunConflict, match=f"numerics {numerics} there") as refused:
            require_codes(assignment("fp8/gptq", "bf16"), tmp_path)
        assert str(tmp_path / "checkpoint") in refused.value.fix


def test_effort_max_alone_polishes():
    for effort in ("fast", "default", "max"):
        config = SearchConfig.of({"budget_bpe": 5, "effort": effort})
        assert config.effort.polishes == (effort == "max")
