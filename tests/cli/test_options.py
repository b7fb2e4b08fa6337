"""Settings: flags, then the configuration file, then defaults; and help under headings."""

from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from autoquant.cli.options import (
    GroupedCommand,
    budget_options,
    config_option,
    format_option,
    model_argument,
    option,
    resolved_settings,
    token_options,
    tracking_options,
)
from autoquant.errors import ConfigError


@click.command("tune", cls=GroupedCommand, examples=[("autoquant tune --seed 1", "Again:")])
@model_argument(required=False)
@budget_options(required=True)
@option("--seed", heading="Search", type=int, default=0, help="Seed.")
@option("--token", heading="Data", multiple=True, help="Any number of them.")
@tracking_options()
@config_option
@format_option
@click.pass_context
def tune(context: click.Context, **_: object) -> None:
    """Print the resolved settings."""
    click.echo(yaml.safe_dump(resolved_settings(context)))


@click.command("sweep", cls=GroupedCommand)
@budget_options(required=True, several=True)
@token_options()
@config_option
@click.pass_context
def sweep(context: click.Context, **_: object) -> None:
    """Print the budgets as a search gets them."""
    click.echo(context.params["budget_bpe"])


def run(*arguments: object, command: click.Command = tune) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def settings(*arguments: object) -> dict[str, object]:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    loaded = yaml.safe_load(result.stdout)
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def error_of(*arguments: object, command: click.Command = tune) -> ConfigError:
    error = run(*arguments, command=command).exception
    assert isinstance(error, ConfigError)
    return error


def test_defaults():
    assert settings("--budget-bpe", 5) == {
        "schema_version": 1,
        "budget_bpe": 5.0,
        "budget_scope": "checkpoint",
        "seed": 0,
        "token": [],
        "mlflow": True,
        "mlflow_experiment": "autoquant",
        "mlflow_trials": "all",
    }


def test_the_file_wins_over_defaults_and_flags_win_over_the_file(config):
    config.write_text("model: ./m\nbudget_bpe: 4.9\nseed: 3\ntoken: [a, b]\nmlflow: false\n")
    got = settings("--config", config, "--seed", 4)
    assert got["model"] == "./m"
    assert got["budget_bpe"] == 4.9
    assert got["seed"] == 4
    assert got["token"] == ["a", "b"]
    assert got["mlflow"] is False


def test_the_order_of_flag_and_file_does_not_matter(config):
    config.write_text("budget_bpe: 4.9\nseed: 3\n")
    assert settings("--config", config, "--seed", 4) == settings("--seed", 4, "--config", config)


def test_resolved_settings_are_a_configuration_file_that_gives_the_same_again(config):
    first = settings("m", "--budget-bpe", 5.25, "--token", "x", "--no-mlflow", "--seed", 7)
    config.write_text(yaml.safe_dump(first))
    assert settings("--config", config) == first


def test_one_value_does_for_a_setting_that_takes_many(config):
    config.write_text("budget_bpe: 5\ntoken: abc\n")
    assert settings("--config", config)["token"] == ["abc"]


def test_an_empty_file_changes_nothing(config):
    config.write_text("# nothing yet\n")
    assert settings("--budget-bpe", 5, "--config", config) == settings("--budget-bpe", 5)


def test_a_key_without_a_value_leaves_the_default(config):
    config.write_text("budget_bpe: 5\nseed:\n")
    assert settings("--config", config)["seed"] == 0


def test_a_required_setting_may_come_from_the_file_and_is_missed_otherwise(config):
    config.write_text("budget_bpe: 5\n")
    assert settings("--config", config)["budget_bpe"] == 5.0
    result = run()
    assert result.exit_code == 2
    assert "--budget-bpe" in result.stderr


def test_an_unknown_key_names_the_nearest_setting(config):
    config.write_text("budget-bpe: 5\n")
    error = error_of("--config", config)
    assert "'budget-bpe' is not a setting of `tune`" in error.message
    assert error.fix == "write 'budget_bpe'."


def test_an_unknown_key_far_from_any_setting_lists_them(config):
    config.write_text("zzz: 5\n")
    assert error_of("--config", config).fix.startswith("settings are: budget_bpe, ")


@pytest.mark.parametrize("key", ["format", "config", "help"])
def test_what_concerns_one_call_is_no_setting(config, key):
    config.write_text(f"{key}: json\n")
    assert f"{key!r} is not a setting" in error_of("--config", config).message


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("seed: 1.5", "'1.5' is not a valid integer"),
        ("budget_bpe: five", "'five' is not a valid budget"),
        ("budget_bpe: 5,5", "'5,5' has a comma: this command takes one budget"),
        ("budget_bpe: -1", "not in the range"),
        ("budget_scope: all", "is not one of"),
        ("budget_bpe: {a: 1}", "it takes a single value"),
        ("budget_bpe: [1, 2]", "it takes a single value"),
        ("token: [a, [b]]", "it takes a list of single values"),
    ],
)
def test_a_bad_value_names_the_file_the_key_and_the_rule(config, line, rule):
    config.write_text(line if line.startswith("budget_bpe") else f"budget_bpe: 5\n{line}")
    error = error_of("--config", config)
    assert str(config) in error.message
    assert line.partition(":")[0] in error.message
    assert rule in error.message


@pytest.mark.parametrize("written", ["[5, 6.5]", '"5,6.5"', "5,6.5", "['5', 6.5]"])
def test_several_budgets_are_a_list_or_a_text_with_commas(config, written):
    config.write_text(f"budget_bpe: {written}\n")
    result = run("--config", config, command=sweep)
    assert result.stdout == "(5.0, 6.5)\n", result.exception


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("budget_bpe: [5, [6]]", "it takes a list of single values"),
        ("budget_bpe: []", "is not a valid budget"),
        ("budget_bpe: [5, 5.0]", "names a budget twice"),
        ("seed: -1", "-1 is not in the range x>=0"),
    ],
)
def test_a_bad_value_of_a_search_names_the_file_and_the_rule(config, line, rule):
    config.write_text(line if line.startswith("budget_bpe") else f"budget_bpe: 5\n{line}")
    error = error_of("--config", config, command=sweep)
    assert error.message.startswith(f"{config}: {line.partition(':')[0]}")
    assert rule in error.message


def test_a_bad_flag_is_not_blamed_on_the_file(config):
    config.write_text("budget_bpe: 5\n")
    result = run("--config", config, "--seed", "x")
    assert result.exit_code == 2
    assert "--seed" in result.stderr
    assert str(config) not in result.stderr


@pytest.mark.parametrize("text", ["- a\n", "just words\n", "a: [1\n", "5\n"])
def test_a_file_that_is_no_mapping_is_refused(config, text):
    config.write_text(text)
    assert error_of("--config", config).fix == "write YAML, one `setting: value` a line."


def test_a_file_that_is_not_text_is_refused(config):
    config.write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot be read" in error_of("--config", config).message


def test_a_file_of_another_schema_is_refused(config):
    config.write_text("schema_version: 2\nbudget_bpe: 5\n")
    assert "schema_version 2, this version reads 1" in error_of("--config", config).message


def test_a_missing_file_is_a_usage_error():
    result = run("--config", "absent.yaml")
    assert result.exit_code == 2
    assert "absent.yaml" in result.stderr


def test_help_lists_options_under_headings_in_order():
    lines = run("--help").stdout.splitlines()
    headings = [line for line in lines if line and not line.startswith(" ") and line.endswith(":")]
    assert headings == [
        "Budget:",
        "Search:",
        "Data:",
        "Tracking:",
        "Output:",
        "Other:",
        "Examples:",
    ]
    assert "    autoquant tune --seed 1" in lines


def test_a_heading_that_does_not_exist_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="heading 'Misc'"):
        option("--x", heading="Misc", help="X.")(lambda x: None)
