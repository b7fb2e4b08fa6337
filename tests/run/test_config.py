"""One configuration behind the command line, settings files and Python."""

import inspect
import re
import shlex
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import autoquant
import autoquant.run.budgets
from autoquant.cli.configured import ConfiguredCommand
from autoquant.errors import ConfigError
from autoquant.run.config import ProbeConfig, ScoreConfig, SearchConfig
from autoquant.run.config.file import read_settings, settings_text
from autoquant.run.config.setting import Setting, SettingField
from autoquant.run.config.types import Positive


class PatientConfig(SearchConfig):
    """A search with one setting more."""

    patience: Annotated[
        Positive, Setting("Search", "End the trials after N without a gain.", "N")
    ] = 7


def command_of(kind: type[SearchConfig], taken: list[SearchConfig]) -> click.Command:
    """A command that keeps its configuration in `taken`."""

    @click.command("search", cls=ConfiguredCommand, config=kind)
    def command(config: SearchConfig) -> None:
        taken.append(config)

    return command


def parsed(words: list[str], kind: type[SearchConfig] = SearchConfig) -> SearchConfig:
    taken: list[SearchConfig] = []
    done = CliRunner().invoke(command_of(kind, taken), words, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return taken[0]


def test_a_new_setting_is_one_field(tmp_path):
    shown = CliRunner().invoke(command_of(PatientConfig, []), ["--help"]).stdout
    section = shown.partition("\nSearch:")[2].partition("\nData:")[0]
    words = " ".join(section.split())
    assert "--patience N End the trials after N without a gain. [default: 7; x>=1]" in words

    file = tmp_path / "settings.yaml"
    file.write_text("budget_bpe: 5\npatience: 9\n")
    from_python = PatientConfig.of({"budget_bpe": 5.0, "patience": 9})
    assert parsed(["--budget-bpe", "5", "--patience", "9"], PatientConfig) == from_python
    assert parsed(["--config", str(file)], PatientConfig) == from_python
    assert parsed(["--budget-bpe", "5"], PatientConfig).patience == 7
    assert yaml.safe_load(settings_text(from_python))["patience"] == 9
    assert from_python.command_line() == "autoquant search --budget-bpe 5 --patience 9"


def test_a_rule_is_the_same_wherever_the_value_comes_from(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("budget_bpe: 5\npatience: 0\n")
    rule = "0 is not in the range x>=1"
    with pytest.raises(ConfigError) as python:
        PatientConfig.of({"budget_bpe": 5, "patience": 0})
    assert python.value.message == f"Invalid value for '--patience': {rule}."
    with pytest.raises(ConfigError) as yaml_file:
        parsed(["--config", str(file)], PatientConfig)
    assert yaml_file.value.message == f"{file}: patience: {rule}."
    with pytest.raises(click.BadParameter) as flag:
        parsed(["--budget-bpe", "5", "--patience", "0"], PatientConfig)
    assert flag.value.message == rule
    assert flag.value.param is not None
    assert flag.value.param.name == "patience"


def values_of(field: SettingField) -> st.SearchStrategy[Any]:
    if field.choices:
        return st.sampled_from(field.choices)
    numbers = [int(number) for number in re.findall(r"\d+", field.bounds)] or [0]
    least, most = numbers[0], numbers[1] if len(numbers) > 1 else 1e9
    bits = st.floats(0, 64, exclude_min=True)
    text = st.text(st.characters(codec="utf-8"))
    of_kind = {
        bool: st.booleans(),
        int: st.integers(least, 2**40),
        float: st.floats(least, most, exclude_min=True),
        tuple: st.lists(bits, min_size=1, max_size=3, unique=True),
        str: text,
        Path: st.text("ab -_/'", min_size=1).map(Path),
    }
    return of_kind[field.kind]


@st.composite
def configs(draw: st.DrawFn) -> SearchConfig:
    """Searches of any settings, each left out half of the time."""
    values = {
        name: draw(values_of(field))
        for name, field in SearchConfig.settings().items()
        if name == "budget_bpe" or draw(st.booleans())
    }
    values |= {"sampler": "my.own:Sampler"} if "sampler" in values else {}
    if "target" in values:
        values.pop("activation_mode", None)  # the same by an earlier name
    if "workers" in values:
        values["trials_at_once"] = max(values["workers"], values.get("trials_at_once", 1))
    return SearchConfig.of(values)


@given(configs())
def test_the_command_line_of_a_search_gives_it_again(config):
    program, command, *words = shlex.split(config.command_line())
    assert (program, command) == ("autoquant", "search")
    assert parsed(words) == config


@given(configs())
def test_the_settings_file_of_a_search_gives_it_again(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("settings") / "config.resolved.yaml"
    file.write_text(settings_text(config), encoding="utf-8")
    again = SearchConfig.of(read_settings(file, SearchConfig))
    of_one_call = {
        name: getattr(config, name)
        for name, field in SearchConfig.settings().items()
        if not field.setting.is_saved
    }
    assert again.model_copy(update=of_one_call) == config


def test_settings_of_an_earlier_version_are_read(tmp_path):
    """As 0.1.0 wrote them, key by key, with several budgets as a text."""
    file = tmp_path / "config.resolved.yaml"
    file.write_text(
        "schema_version: 1\nmodel: ./m\nrevision: '1234'\nbudget_bpe: 4.8,5\n"
        "budget_scope: searched\ncost: active-bytes\nspace: default\nactivation_mode: w4a16\n"
        "kv_cache: fp8\nprobe: gradient\ntrials: 12\nmax_seconds: 60.0\n"
        "max_tokens: 100000\ncalibration: stdlib\nseed: 7\ncalibration_tokens: 64\n"
        "calibrate_all_experts: true\nsearch_tokens: 96\nreport_tokens: 128\n"
        "sequence_length: 32\nbatch_tokens: 256\ndevice: cpu\ntrust_remote_code: false\n"
        "mlflow: false\nmlflow_experiment: autoquant\nmlflow_trials: best\n"
        "layout: compressed-tensors\n"
    )
    config = SearchConfig.of(read_settings(file, SearchConfig))
    assert config.budget_bpe == (4.8, 5.0)
    written = yaml.safe_load(file.read_text())
    later = {
        "sampler": "budget",
        "weights": "auto",
        "trials_at_once": 1,
        "workers": 1,
        "effort": "default",
        "a16_share": 0.0,
        "input_headroom": 2.0,
    }
    assert config.saved() == written | later | {"budget_bpe": [4.8, 5.0]}


def alternatives(annotation: Any) -> set[Any]:
    """What an annotation allows: types, None, the values of a Literal; a path counts as text."""
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*map(alternatives, get_args(annotation)))
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {str if annotation is Path else annotation}


OF_ONE_BUDGET = {"budget_bpe": (float, inspect.Parameter.empty), "export": (bool, True)}
"""Where `search`, which has one budget, says more than the field, which may have several."""


def test_the_signature_of_search_says_what_the_fields_say():
    signature = inspect.signature(autoquant.search)
    arguments = {n: p for n, p in signature.parameters.items() if n != "observer"}
    fields = SearchConfig.settings()
    assert arguments.keys() == fields.keys()
    for name, argument in arguments.items():
        field = fields[name]
        is_none_allowed = type(None) in get_args(field.info.annotation)
        kinds = set(field.choices) or {str if field.kind is Path else field.kind}
        kinds |= {type(None)} if is_none_allowed else set()
        default = field.info.get_default()
        if name in OF_ONE_BUDGET:
            kind, default = OF_ONE_BUDGET[name]
            kinds = {kind}
        assert alternatives(argument.annotation) == kinds, name
        assert argument.default == default, name
        assert argument.kind is (
            argument.POSITIONAL_OR_KEYWORD if field.setting.is_argument else argument.KEYWORD_ONLY
        )


def test_the_help_of_search_describes_every_argument():
    text = inspect.getdoc(autoquant.search) or ""
    described = text.partition("Args:\n")[2].partition("\nRaises:")[0]
    names = [line.strip().partition(":")[0] for line in described.splitlines() if line[4:5] != " "]
    assert {*names} >= {*inspect.signature(autoquant.search).parameters}


class Stopped(Exception):
    """The configuration of a search that was not begun."""


@pytest.fixture
def stopped(monkeypatch):
    def stop(config, observer):
        raise Stopped(config, observer)

    monkeypatch.setattr(autoquant.run.budgets, "run_searches", stop)


OTHER = {
    "model": Path("m"),
    "revision": "v1",
    "device": "cpu",
    "trust_remote_code": True,
    "weights": "disk",
    "device_memory": "40GiB",
    "host_memory": 2**33,
    "budget_scope": "searched",
    "cost": "active-bytes",
    "cost_table": Path("costs.yaml"),
    "cost_limit": 7,
    "space": "mine.yaml",
    "effort": "fast",
    "a16_share": 0.25,
    "target": "hopper",
    "activation_mode": "w4a16",
    "kv_cache": "fp8",
    "probe": "exact",
    "trials": 5,
    "sensitivity": "runs/probes",
    "sampler": "tpe",
    "trials_at_once": 4,
    "workers": 2,
    "max_seconds": 9,
    "max_tokens": 99,
    "calibration": "text",
    "seed": 1,
    "sequence_length": 32,
    "batch_tokens": 64,
    "calibration_tokens": 33,
    "calibrate_all_experts": True,
    "input_headroom": 4,
    "search_tokens": 34,
    "report_tokens": 35,
    "report_by": "position",
    "mlflow": False,
    "study_storage": "sqlite:///study.db",
    "mlflow_experiment": "e",
    "mlflow_trials": "none",
    "out": "runs/mine",
    "resume": False,
    "layout": "compressed-tensors",
    "export": False,
}
"""A value of every argument that is not its default."""


def test_every_argument_of_search_reaches_the_search(stopped):
    assert OTHER.keys() | {"budget_bpe"} == SearchConfig.model_fields.keys()
    watcher = object()
    with pytest.raises(Stopped) as caught:
        autoquant.search(**OTHER, budget_bpe=4.1234567, observer=watcher)
    config, observer = caught.value.args
    assert observer is watcher
    assert config == SearchConfig.of({**OTHER, "budget_bpe": [4.1234567]})
    default = SearchConfig.of({"budget_bpe": 5.0})
    assert all(getattr(config, name) != getattr(default, name) for name in OTHER)


def test_budgets_reach_the_search_with_all_their_digits(stopped):
    with pytest.raises(Stopped) as caught:
        autoquant.search_budgets(budgets_bpe=[5.0000001, 5.0000002], seed=3)
    config, _ = caught.value.args
    assert config.budget_bpe == (5.0000001, 5.0000002)
    assert config.seed == 3
    assert config.export is False


def test_search_takes_one_budget_and_search_budgets_several(stopped):
    with pytest.raises(ConfigError, match=r"'5,6' is not a valid budget"):
        autoquant.search(budget_bpe="5,6")
    with pytest.raises(TypeError, match="budgets_bpe"):
        autoquant.search_budgets(budgets_bpe=[5], budget_bpe=6)
    with pytest.raises(TypeError, match="'trails'"):
        autoquant.search_budgets(budgets_bpe=[5], trails=6)


def test_one_budget_is_exported_and_several_only_when_told():
    assert SearchConfig.of({"budget_bpe": 5}).export is True
    assert SearchConfig.of({"budget_bpe": "5,6"}).export is False
    told = SearchConfig.of({"budget_bpe": "5,6", "export": True})
    assert [search.export for search in told.of_each_budget()] == [True, True]


def test_probes_are_of_the_same_settings_as_the_search_that_takes_them_over():
    settings = {"space": "mine.yaml", "seed": 4, "search_tokens": 64, "kv_cache": "fp8"}
    probes = ProbeConfig.of(settings)
    search = SearchConfig.of({**settings, "budget_bpe": 5})
    assert {n: getattr(search, n) for n in settings} == {n: getattr(probes, n) for n in settings}
    assert probes.tokens.search == search.tokens.search == 64
    assert search.tokens.report == 65_536


def test_a_file_that_is_not_there_is_a_wrong_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"--assignment.*File '.*absent.yaml' does not exist"):
        ScoreConfig.of({"assignment": tmp_path / "absent.yaml"})


@pytest.mark.parametrize(
    ("model", "settings", "text", "longest"),
    [
        (None, {}, "stdlib", 256),
        ("m", {}, "mixture", 2_048),
        ("m", {"calibration": "mine.txt", "sequence_length": 64}, "mine.txt", 64),
    ],
)
def test_text_and_lengths_follow_the_model_unless_given(model, settings, text, longest):
    config = SearchConfig(budget_bpe=5, model=model, **settings)
    assert (config.text, config.longest) == (text, longest)
    assert config.tokens.sequence_length == longest
