"""Settings: flags, then the configuration file, then defaults; and help under headings."""

from pathlib import Path
from typing import Annotated, ClassVar

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from autoquant.cli.configured import ConfiguredCommand
from autoquant.cli.options import format_option
from autoquant.errors import ConfigError
from autoquant.plan.budget import Scope
from autoquant.run.config import SearchConfig
from autoquant.run.config.commands import BudgetScope
from autoquant.run.config.file import settings_text
from autoquant.run.config.parts import ModelConfig, TrackingConfig
from autoquant.run.config.setting import Setting
from autoquant.run.config.types import Bits


class TuneConfig(TrackingConfig, ModelConfig):
    """A few settings of every kind."""

    command: ClassVar[str] = "tune"

    budget_bpe: Annotated[Bits, Setting("Budget", "Most bits.", "BITS")]
    budget_scope: BudgetScope = Scope.CHECKPOINT
    seed: Annotated[int, Setting("Search", "Seed.", "N")] = 0


@click.command(
    "tune",
    cls=ConfiguredCommand,
    config=TuneConfig,
    examples=[("autoquant tune --seed 1", "Again:")],
)
@format_option
def tune(config: TuneConfig, format: str) -> None:
    """Print the settings in force."""
    click.echo(settings_text(config))


@click.command("search", cls=ConfiguredCommand, config=SearchConfig)
def sweep(config: SearchConfig) -> None:
    """Print the budgets as a search gets them."""
    click.echo(config.budget_bpe)


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
        "mlflow": True,
        "mlflow_experiment": "autoquant",
        "mlflow_trials": "all",
    }


def test_the_file_wins_over_defaults_and_flags_win_over_the_file(config):
    config.write_text("model: ./m\nbudget_bpe: 4.9\nseed: 3\nmlflow: false\n")
    got = settings("--config", config, "--seed", 4)
    assert got["model"] == "./m"
    assert got["budget_bpe"] == 4.9
    assert got["seed"] == 4
    assert got["mlflow"] is False
    assert settings("--config", config, "--mlflow")["mlflow"] is True


def test_a_flag_wins_over_the_file_also_where_it_gives_the_default(config):
    config.write_text("budget_bpe: 5\nseed: 3\n")
    assert settings("--config", config, "--seed", 0)["seed"] == 0


def test_the_order_of_flag_and_file_does_not_matter(config):
    config.write_text("budget_bpe: 4.9\nseed: 3\n")
    assert settings("--config", config, "--seed", 4) == settings("--seed", 4, "--config", config)


def test_the_settings_in_force_are_a_configuration_file_that_gives_the_same_again(config):
    first = settings("m", "--budget-bpe", 5.25, "--no-mlflow", "--seed", 7)
    config.write_text(yaml.safe_dump(first))
    assert settings("--config", config) == first


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


@pytest.mark.parametrize("key", ["format", "config", "help", "out", "resume", "export"])
def test_what_concerns_one_call_is_no_setting(config, key):
    config.write_text(f"budget_bpe: 5\n{key}: json\n")
    assert f"{key!r} is not a setting" in error_of("--config", config, command=sweep).message


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("seed: 1.5", "1.5 is not a valid integer"),
        ("seed: yes", "True is not a valid integer"),
        ("seed: x", "'x' is not a valid integer"),
        ("mlflow: 7", "7 is not a valid yes or no"),
        ("mlflow_experiment: 2024", "2024 is no text; put it in quotes"),
        ("mlflow_trials: some", "'some' is not one of 'all', 'best', 'none'"),
        ("budget_bpe: five", "'five' is not a valid budget"),
        ("budget_bpe: 5,5", "'5,5' has a comma: this command takes one budget"),
        ("budget_bpe: -1", "-1 is not in the range x>0"),
        ("budget_bpe: .nan", "nan is not a finite number"),
        ("budget_scope: all", "'all' is not one of 'checkpoint', 'searched'"),
        ("budget_bpe: {a: 1}", "it takes a single value"),
        ("budget_bpe: [1, 2]", "it takes a single value"),
    ],
)
def test_a_bad_value_names_the_file_the_key_and_the_rule(config, line, rule):
    config.write_text(line if line.startswith("budget_bpe") else f"budget_bpe: 5\n{line}")
    error = error_of("--config", config)
    name = line.partition(":")[0]
    assert error.message.startswith(f"{config}: {name}: ")
    assert rule in error.message
    assert error.fix == f"correct `{name}` in the file."


@pytest.mark.parametrize("written", ["[5, 6.5]", '"5,6.5"', "5,6.5", "['5', 6.5]"])
def test_several_budgets_are_a_list_or_a_text_with_commas(config, written):
    config.write_text(f"budget_bpe: {written}\n")
    result = run("--config", config, command=sweep)
    assert result.stdout == "(5.0, 6.5)\n", result.exception


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("budget_bpe: [5, [6]]", "a list of single values"),
        ("budget_bpe: [5, true]", "a list of single values"),
        ("budget_bpe: []", "is not a valid budget"),
        ("budget_bpe: [5, 5.0]", "names a budget twice"),
        ("seed: -1", "-1 is not in the range x>=0"),
        ("search_tokens: 31", "31 is not in the range x>=32"),
    ],
)
def test_a_bad_value_of_a_search_names_the_file_and_the_rule(config, line, rule):
    config.write_text(line if line.startswith("budget_bpe") else f"budget_bpe: 5\n{line}")
    error = error_of("--config", config, command=sweep)
    assert error.message.startswith(f"{config}: {line.partition(':')[0]}")
    assert rule in error.message


def test_a_bad_flag_is_not_blamed_on_the_file(config):
    config.write_text("budget_bpe: 5\nseed: 3\n")
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
    assert "is not UTF-8" in error_of("--config", config).message


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
        "Model:",
        "Budget:",
        "Search:",
        "Tracking:",
        "Output:",
        "Other:",
        "Examples:",
    ]
    assert "    autoquant tune --seed 1" in lines


def test_help_says_default_range_and_what_must_be_given():
    words = " ".join(run("--help", command=sweep).stdout.split())
    assert "--trials N Whole assignments to measure" in words
    assert "scale rules and roundings. [default: 30; x>=0]" in words
    assert "one set of probes. [required]" in words
    assert "--resume / --fresh" in words
    assert "sets it aside. [default: resume]" in words
    assert "--max-tokens N" in words
    assert "A finished result stays; --fresh begins anew. [x>=1]" in words
    assert "[default: checkpoint]" in words
    assert "[default: the first GPU, else the CPU]" in words


def test_a_heading_that_does_not_exist_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="heading 'Misc'"):
        Setting("Misc", "X.")
