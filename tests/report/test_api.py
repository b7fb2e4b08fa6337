"""Runs from Python."""

import json

import pytest
from records import trials_of

import autoquant
from autoquant.errors import ConfigError, InfeasibleBudget


@pytest.fixture
def found(finished) -> autoquant.Run:
    return autoquant.load_run(finished)


def test_a_run_knows_where_it_is_and_how_far_it_came(found, finished):
    assert found.path == finished
    assert found.status == "finished"
    assert found.missing == ()
    assert repr(found) == f"<autoquant.Run {finished} finished>"


def test_the_result_is_the_file(found, finished):
    stored = json.loads((finished / "result.json").read_text())
    assert stored.pop("schema_version") == 1
    assert stored.pop("checksum")
    assert found.result == stored


def test_trials_are_those_on_disk_with_the_sum_of_their_groups(found, finished):
    trials = found.trials()
    records = trials_of(finished)
    assert list(trials["kl"]) == [record["kl"] for record in records]
    alone = found.sensitivity().set_index(["group", "choice"])["kl"]
    for trial in trials.itertuples():
        expected = sum(alone.get(item, 0.0) for item in trial.groups.items())
        assert trial.predicted_kl == pytest.approx(expected)


def test_nothing_beats_the_frontier_and_all_else_is_beaten(found):
    trials, frontier = found.trials(), found.frontier()
    assert frontier["bpe"].is_monotonic_increasing
    assert frontier["kl"].is_monotonic_decreasing
    for number, trial in trials.iterrows():
        beaten = ((frontier["bpe"] <= trial["bpe"]) & (frontier["kl"] < trial["kl"])).any()
        level = ((frontier["bpe"] == trial["bpe"]) & (frontier["kl"] == trial["kl"])).any()
        assert (number in frontier.index) <= (not beaten)
        assert beaten or level or number in frontier.index


def test_groups_hold_the_winner_and_baselines_hold_it_too(found):
    result = found.result
    groups = found.groups()
    assert groups["choice"].str.partition("/")[0].value_counts().to_dict() == {
        name: count for name, count in result["counts"].items() if count
    }
    baselines = found.baselines()
    assert baselines["kl"].is_monotonic_increasing
    winner = baselines.set_index("name").loc["the winner"]
    assert winner["kl"] == result["kl"]["mean"]
    assert len(baselines) == 1 + len(result["baselines"])


@pytest.mark.parametrize(
    "plot",
    ["frontier", "map", "sensitivity", "prediction", "convergence", "tokens", "coverage", "sizes"],
)
def test_pictures_are_figures_also_of_an_unfinished_run(found, interrupted, plot):
    from matplotlib.figure import Figure

    for run in (found, autoquant.load_run(interrupted)):
        figure = getattr(run, f"plot_{plot}")()
        assert isinstance(figure, Figure)
        assert figure.axes or figure.subfigs


def test_an_unfinished_run_has_tables_of_what_there_is(interrupted):
    run = autoquant.load_run(interrupted)
    assert run.result is None
    assert run.baselines().empty
    assert not run.trials().empty
    assert not run.sensitivity().empty
    (interrupted / "trials.jsonl").unlink()
    (interrupted / "sensitivity.json").unlink()
    (interrupted / "sensitivity.jsonl").unlink()
    run = autoquant.load_run(interrupted)
    for table in (run.trials(), run.frontier(), run.sensitivity()):
        assert table.empty
        assert "kl" in table.columns


def test_the_report_can_be_written_elsewhere(found, finished, tmp_path):
    written = found.write_report(tmp_path / "report.html")
    assert written.read_text() == (finished / "report.html").read_text()


def test_a_search_records_the_command_line_that_repeats_it(found, settings, finished):
    command = found.result["command"]
    assert command.startswith(f"autoquant search {settings['model']} --budget-bpe 9 --trials 4 ")
    assert "--no-mlflow" in command
    assert command.endswith(f" --out {found.path} --no-export")


def test_the_package_is_callable_whichever_of_its_modules_is_imported_first():
    import autoquant.run.config

    assert callable(autoquant.search)
    assert autoquant.run.config.SearchConfig


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"budget_bpe": 0}, "--budget-bpe"),
        ({"trials": -1}, "--trials"),
        ({"search_tokens": 1}, "--search-tokens"),
        ({"activation_mode": "w8a8"}, "--activation-mode"),
        ({"budget_scope": "layer"}, "--budget-scope"),
        ({"max_seconds": 0}, "--max-seconds"),
    ],
)
def test_arguments_pass_the_checks_of_flags(settings, tmp_path, wrong, named):
    with pytest.raises(ConfigError, match=named):
        autoquant.search(**(settings | wrong), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_infeasible_budget_writes_nothing(settings, tmp_path):
    with pytest.raises(InfeasibleBudget):
        autoquant.search(**(settings | {"budget_bpe": 1.0}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory"):
        autoquant.load_run(tmp_path)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        _ = autoquant.serach
