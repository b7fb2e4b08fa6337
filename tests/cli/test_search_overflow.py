"""A search of a model whose output overflows in some assignments: stopped, resumed, reported."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from records import trials_of
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.cli.terminal import Terminal
from autoquant.measure.scorer import Scorer
from autoquant.report.record import RunRecord

pytestmark = pytest.mark.slow

BROKEN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overflow")
    save_searchable("llama", folder / "model")
    save_text(folder / "text")
    return folder


@pytest.fixture
def search(autoquant, folder, tmp_path):
    def call(*flags):
        return autoquant(
            *("search", folder / "model", "--budget-bpe", 9, "--calibration", folder / "text"),
            *(*TOKEN_FLAGS, "--no-mlflow", "--no-export", "--trials", 8, "--probe", "exact"),
            *("--out", tmp_path / "run", *flags),
        )

    return call


def overflow(monkeypatch, breaks):
    """Let tokens' KL be infinite under the assignments that `breaks` names, alone or jointly."""
    measure, probe = Scorer._measure, Scorer.probe

    def broken(scores):
        kl = scores.kl.copy()
        kl[3] = np.inf
        return type(scores)(**{**vars(scores), "kl": kl})

    def measured(self, assignments, *rest, **how):
        return [
            [
                broken(scores) if breaks(dict(assignment)) else scores
                for assignment, scores in zip(own, batch, strict=True)
            ]
            for own, batch in zip(
                assignments, measure(self, assignments, *rest, **how), strict=True
            )
        ]

    def probed(self, split, probes, sketch=None):
        for found in probe(self, split, probes, sketch):
            is_broken = breaks(dict([found.key]))
            yield replace(found, kl=broken(found.kl)) if is_broken else found

    monkeypatch.setattr(Scorer, "_measure", measured)
    monkeypatch.setattr(Scorer, "probe", probed)


def in_nvfp4(choices):
    return str(choices.get(BROKEN, "")).startswith("nvfp4")


def test_a_search_goes_on_after_an_overflow_and_never_takes_it(search, tmp_path, monkeypatch):
    overflow(monkeypatch, in_nvfp4)
    run = tmp_path / "run"

    def stop(terminal, trial, best):
        if trial.number == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Terminal, "trial", stop)
        assert search().exit_code == 130
    lines = trials_of(run)
    assert [line["kl"] for line in lines].count("Infinity") >= 1
    probes = [json.loads(line) for line in (run / "sensitivity.jsonl").read_text().splitlines()]
    assert {p["group"] for p in probes if p["kl_sum"] == "Infinity"} == {BROKEN}

    done = search()
    assert done.exit_code == 0, done.stderr
    assert f"warning: {BROKEN} in nvfp4/max overflows" in done.stderr
    assert "(baseline: uniform nvfp4) overflows: its KL is not finite" in done.stderr
    result = json.loads((run / "result.json").read_text())
    assert math.isfinite(result["kl"]["mean"])
    assert not in_nvfp4(dict(RunRecord.read(run).best.groups))
    assert "uniform nvfp4" not in {row["name"] for row in result["baselines"]}
    record = RunRecord.read(run)
    assert any(math.isinf(trial.kl) for trial in record.trials)
    assert not any(trial.is_frontier for trial in record.trials if math.isinf(trial.kl))
    assert "report.html could not be written" not in done.stderr
    assert (run / "report.html").exists()


def test_a_search_in_which_all_overflows_ends_with_an_error(search, monkeypatch):
    overflow(monkeypatch, lambda choices: len(choices) > 1)
    done = search()
    assert done.exit_code == 4
    assert "finite: the quantized model's output overflows" in done.stderr


def test_a_report_is_made_of_a_search_that_stopped_after_an_overflow(
    search, autoquant, tmp_path, monkeypatch
):
    overflow(monkeypatch, in_nvfp4)

    def stop(terminal, trial, best):
        if trial.number == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, "trial", stop)
    assert search().exit_code == 130
    done = autoquant("report", tmp_path / "run")
    assert done.exit_code == 0, done.stderr


def test_figures_that_are_not_known_are_none_or_left_out(search, tmp_path, monkeypatch):
    measured = Scorer.noise
    monkeypatch.setattr(
        Scorer,
        "noise",
        lambda *given: replace(found := measured(*given), kl=found.kl * math.nan),
    )
    done = search("--trials", 0, "--report-tokens", 128)
    assert done.exit_code == 0, done.stderr
    assert "noise floor  - nats per token" in done.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["resolution"] is None
    assert "differences above" not in done.stdout
