"""`autoquant search` under several budgets: one set of probes, and each run as if it were alone."""

import json
import re
import shutil

import pytest
from click.testing import CliRunner
from records import forget_checksums, trials_of
from searchable import TOKEN_FLAGS, save_searchable, save_text

import autoquant as package
from autoquant.cli import cli
from autoquant.store.run_directory import home_of

pytestmark = pytest.mark.slow

OWN = ("run", "seconds", "versions", "command", "checksum")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets")
    save_searchable("qwen3_moe", folder / "model")
    save_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def search(folder):
    def call(budget, out, *flags, code=0):
        words = (
            *("search", folder / "model", "--calibration", folder / "text", *TOKEN_FLAGS),
            *("--budget-bpe", budget, "--trials", 12, "--no-mlflow", "--out", out, *flags),
        )
        result = CliRunner().invoke(cli, [str(word) for word in words])
        assert result.exit_code == code, result.stderr
        return result

    return call


@pytest.fixture(scope="module")
def searched(search, tmp_path_factory):
    """The folder of two budgets, and what their search prints."""
    many = tmp_path_factory.mktemp("searched") / "many"
    return many, search("10,8.5", many, "--format", "json").stdout


def trials(run):
    return [{k: v for k, v in trial.items() if k != "seconds"} for trial in trials_of(run)]


def outcome(run):
    result = json.loads((run / "result.json").read_text())
    for row in result["stages"]:
        del row["seconds"]
    return {k: v for k, v in result.items() if k not in OWN}


def test_each_budget_ends_as_it_would_alone(search, searched, tmp_path):
    many, printed = searched
    assert [row["budget_bpe"] for row in json.loads(printed)["runs"]] == [10.0, 8.5]
    second = many / "8.5bpe"
    search(8.5, tmp_path / "alone", "--no-export")
    assert trials(second) == trials(tmp_path / "alone")
    assert outcome(second) == outcome(tmp_path / "alone")
    assert json.loads((second / "seconds.json").read_text())["probe"] < 1.0
    assert not (second / "checkpoint").exists()
    page = (many / "compare.html").read_text()
    assert "8.5bpe" in page
    assert "10bpe" in page
    again = search("10,8.5", many)
    assert "already holds this search's result" in again.stderr
    assert "next:       autoquant compare" in again.stdout


def test_a_later_budget_rests_on_the_first_ones_statistics_also_after_a_kill(
    search, searched, tmp_path
):
    many = shutil.copytree(searched[0], tmp_path / "many")
    assert {name for name in ("codes", "statistics") if (many / "10bpe" / name).exists()}
    kept = {name: (many / "8.5bpe" / name).exists() for name in ("codes", "statistics")}
    assert not any(kept.values())
    before = outcome(many / "8.5bpe")
    shutil.rmtree(many / "8.5bpe")  # what a kill between both leaves
    search("10,8.5", many)
    assert kept == {name: (many / "8.5bpe" / name).exists() for name in kept}
    assert outcome(many / "8.5bpe") == before


def test_the_codes_of_a_later_budget_are_found_with_the_first_one(
    autoquant, folder, search, searched, tmp_path
):
    many = shutil.copytree(searched[0], tmp_path / "many")
    first, second = many / "10bpe", many / "8.5bpe"
    assert home_of(second) == first
    search("10,8.5", many, "--export")
    verify = ("verify", second / "checkpoint", "--source", folder / "model")
    said = " ".join(autoquant(*verify).stdout.split())
    assert re.search(r" [1-9]\d* of them were held against .* and [1-9]\d* against the codes", said)
    asked = ("--assignment", second / "assignment.yaml", "--out", tmp_path / "out")
    done = autoquant(
        *("export", folder / "model", "--calibrated", second / "calibration.json", *asked)
    )
    assert done.exit_code == 0, done.stderr
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (second / "checkpoint" / name).read_bytes()
    splits = json.loads((first / "splits.json").read_text()) | {"calibration": "of other tokens"}
    (first / "splits.json").write_text(json.dumps(splits))
    forget_checksums(first)
    assert home_of(second) == second


def test_all_budgets_are_recorded_where_single_searches_are(autoquant, folder, tmp_path):
    result = autoquant(
        *("search", folder / "model", "--calibration", folder / "text", *TOKEN_FLAGS),
        *("--budget-bpe", "8.5,10", "--trials", 0, "--out", tmp_path / "runs" / "many"),
    )
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "runs" / "mlflow.db").exists()
    assert not (tmp_path / "runs" / "many" / "mlflow.db").exists()


def test_checkpoints_of_several_budgets_on_request(folder, tmp_path):
    runs = package.search_budgets(
        folder / "model",
        budgets_bpe=[8.5, 10],
        calibration=str(folder / "text"),
        calibration_tokens=256,
        search_tokens=512,
        report_tokens=512,
        sequence_length=32,
        trials=0,
        mlflow=False,
        out=tmp_path / "runs",
        export=True,
    )
    sizes = [run.result["checkpoint_bytes"] for run in runs]
    assert len(runs) == 2
    assert sizes[0] < sizes[1]
    assert all((run.path / "checkpoint" / "config.json").exists() for run in runs)
    assert f"{folder / 'model'} --budget-bpe 8.5,10 " in runs[0].result["command"]
    assert runs[0].result["command"].endswith(" --export")


def test_budgets_that_agree_in_six_digits_are_two_searches(search, tmp_path):
    flags = ("--trials", 0, "--probe", "gradient")
    search("9.0000001,9.0000002", tmp_path / "many", *flags)
    runs = [tmp_path / "many" / f"{budget}bpe" for budget in ("9.0000001", "9.0000002")]
    assert [outcome(run)["budget_bpe"] for run in runs] == [9.0000001, 9.0000002]


def test_the_settings_of_a_run_are_those_of_its_search(autoquant, search, tmp_path):
    search("8.7654321,9", tmp_path / "many", "--trials", 0, "--probe", "gradient")
    run = tmp_path / "many" / "8.7654321bpe"
    settings = ("--config", run / "config.resolved.yaml")
    again = autoquant("search", *settings, "--out", run, "--no-export")
    assert again.exit_code == 0, again.stderr
    assert "already holds this search's result" in again.stderr


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("5,5", "names a budget twice"),
        ("5,x", "'x' is not a valid budget"),
        ("5,-1", "-1.0 is not in the range x>0"),
        ("5,", "'' is not a valid budget"),
    ],
)
def test_budgets_that_cannot_be_meant(search, tmp_path, budget, message):
    assert message in search(budget, tmp_path / "run", code=2).stderr
    assert not (tmp_path / "run").exists()


def test_one_infeasible_budget_stops_all_before_anything_is_written(search, tmp_path):
    result = search("9,3", tmp_path / "run", code=3)
    assert "a budget of 3 bits per element" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_single_run_is_no_folder_of_budgets(search, tmp_path):
    search(9, tmp_path / "run", "--no-export", "--trials", 0)
    assert (
        "is the run directory of a single budget"
        in search("8.5,9", tmp_path / "run", code=5).stderr
    )
