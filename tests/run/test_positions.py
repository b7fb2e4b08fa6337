"""KL by position: each token counts where it stands, and errors are over documents."""

import json

import numpy as np
import pytest
from searchable import TOKEN_FLAGS, save_searchable, save_text

import autoquant
from autoquant.measure.kl import TokenKl
from autoquant.measure.uncertainty import UnitTotals
from autoquant.run.by_token.positions import describe_positions


def scores_of(lengths, kl=None, units=None):
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    kl = np.arange(len(sequence), dtype=float) if kl is None else np.asarray(kl, dtype=float)
    units = np.arange(len(lengths)) if units is None else np.asarray(units)
    return TokenKl(kl=kl, sequence=sequence, unit=units)


def test_a_position_begins_anew_with_every_sequence():
    assert scores_of([3, 1, 2]).position().tolist() == [0, 1, 2, 0, 0, 1]


def test_the_mean_at_a_position_is_over_the_sequences_that_reach_it():
    (row,) = describe_positions({"it": scores_of([3, 1, 2], kl=[1, 2, 3, 4, 10, 20])})
    assert row["name"] == "it"
    assert row["mean"] == [5.0, 11.0, 3.0]


def test_buckets_double_and_hold_every_token_once():
    kl = np.concatenate([np.full(32, 1.0), np.full(32, 2.0), np.full(64, 4.0), np.full(22, 8.0)])
    (row,) = describe_positions({"it": scores_of([150, 150], kl=np.tile(kl, 2))})
    found = [(b["first"], b["last"], b["tokens"], b["kl"]) for b in row["buckets"]]
    assert found == [(0, 31, 64, 1.0), (32, 63, 64, 2.0), (64, 127, 128, 4.0), (128, 149, 44, 8.0)]


def test_the_error_of_a_bucket_is_over_documents():
    generator = np.random.default_rng(0)
    scores = scores_of([64] * 6, kl=generator.random(384), units=[0, 0, 1, 1, 2, 2])
    (row,) = describe_positions({"it": scores})
    second = scores.position() >= 32
    own = UnitTotals.of(scores.kl[second], scores.unit[scores.sequence][second])
    assert row["buckets"][1]["stderr"] == own.standard_error()


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("positions")
    flags = dict(zip(TOKEN_FLAGS[::2], TOKEN_FLAGS[1::2], strict=True))
    settings = {flag.lstrip("-").replace("-", "_"): value for flag, value in flags.items()}
    model = save_searchable("llama", folder / "model")
    text = save_text(folder / "text", documents=150, words=40)
    run = autoquant.search(
        model,
        budget_bpe=9.0,
        calibration=str(text),
        trials=2,
        mlflow=False,
        export=False,
        report_by="position",
        out=folder / "run",
        **(settings | {"sequence_length": 64}),
    )
    return run, model, text


def test_a_search_reports_the_winner_and_the_recipes_by_position(searched):
    run, *_ = searched
    rows = run.result["by_position"]
    names = [row["name"] for row in rows]
    assert names[0] == "the winner"
    assert set(names[1:]) == {row["name"] for row in run.result["baselines"]}
    buckets = rows[0]["buckets"]
    assert [(b["first"], b["last"]) for b in buckets] == [(0, 31), (32, 63)]
    total = sum(b["kl"] * b["tokens"] for b in buckets)
    tokens = sum(b["tokens"] for b in buckets)
    assert tokens == run.result["tokens"]["report"]["tokens"]
    assert total / tokens == pytest.approx(run.result["kl"]["mean"], rel=1e-12)


def test_the_report_shows_them(searched):
    run, *_ = searched
    page = (run.path / "report.html").read_text()
    section = page.partition("<h2>By position in the sequence</h2>")[2].partition("<h2>")[0]
    assert "<svg" in section
    assert "32 to 63" in section
    assert "uniform fp8" in section


def test_a_score_reports_the_same_numbers(searched, autoquant):
    run, model, text = searched
    flags = ("--calibration", text, *TOKEN_FLAGS, "--sequence-length", 64)
    arguments = ("score", model, "--assignment", run.path / "assignment.yaml", *flags)
    done = autoquant(*arguments, "--report-by", "position", "--format", "json")
    assert done.exit_code == 0, done.stderr
    assert (
        json.loads(done.stdout)["by_position"][0]["buckets"]
        == (run.result["by_position"][0]["buckets"])
    )
    table = autoquant(*arguments, "--report-by", "position").stdout
    assert "32 to 63" in table
    plain = autoquant(*arguments, "--format", "json")
    assert "by_position" not in json.loads(plain.stdout)
    wrong = autoquant(*arguments, "--report-by", "place")
    assert wrong.exit_code == 2
    assert "--report-by" in wrong.stderr
