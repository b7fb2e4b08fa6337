"""Limits of a search, and what a finished one says and keeps when it is called again."""

import json

import pytest
import yaml
from records import forget_checksums
from searchable import TOKEN_FLAGS, save_searchable, save_text

import autoquant as package
from autoquant.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    save_searchable("llama", folder / "model")
    save_text(folder / "text")
    return folder


@pytest.fixture
def search(autoquant, folder, tmp_path):
    """Search the model with these flags in one run directory; what it said."""

    def call(*flags, code=0):
        result = autoquant(
            *("search", folder / "model", "--budget-bpe", 9, "--calibration", folder / "text"),
            *(*TOKEN_FLAGS, "--no-mlflow", "--no-export", "--out", tmp_path / "run", *flags),
        )
        assert result.exit_code == code, result.stderr
        return result.stderr

    return call


def settings_of(run):
    return yaml.safe_load((run / "config.resolved.yaml").read_text())


STAYS = "this result stays; --fresh sets it aside and begins anew."


@pytest.mark.slow
def test_a_search_cut_short_by_the_clock_says_so_now_and_later(search, tmp_path):
    run = tmp_path / "run"
    said = f"{run}: --max-seconds 0.001 ended the trials early, 0 of 5 were measured."
    first = search("--trials", 5, "--max-seconds", 0.001)
    assert said in first
    assert f"{run}: {STAYS}" in first
    before = (run / "config.resolved.yaml").read_bytes()
    again = search("--trials", 5, "--max-seconds", 1000)
    assert "already holds this search's result" in again
    assert said in again
    assert f"{run}: {STAYS}" in again
    assert (run / "config.resolved.yaml").read_bytes() == before
    assert settings_of(run)["max_seconds"] == 0.001

    anew = search("--trials", 5, "--max-seconds", 1000, "--fresh")
    assert "ended the trials early" not in anew
    assert STAYS not in anew
    assert settings_of(run)["max_seconds"] == 1000.0


def test_a_search_cut_short_by_its_tokens_says_so(search):
    said = search("--trials", 5, "--max-tokens", 1)
    assert "--max-tokens 1 ended the trials early, 0 of 5 were measured." in said


def test_probes_keep_the_settings_that_they_were_made_with(autoquant, folder, tmp_path):
    run = tmp_path / "probes"
    flags = [flag for flag in TOKEN_FLAGS if flag not in ("--report-tokens", 1024)]
    for device in ("cpu", "cpu:0"):
        done = autoquant(
            *("probe", folder / "model", "--calibration", folder / "text", *flags),
            *("--out", run, "--device", device),
        )
        assert done.exit_code == 0, done.stderr
    assert settings_of(run)["device"] == "cpu"


def test_a_run_of_earlier_arithmetic_does_not_go_on(search, tmp_path):
    search("--trials", 0)
    forget_checksums(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    identity = json.loads(path.read_text())
    identity["signature"]["numerics"] = 2
    path.write_text(json.dumps(identity))
    assert "belongs to another search: numerics is 2 there and " in search("--trials", 0, code=5)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"seed": -1}, "--seed.*-1 is not in the range x>=0"),
        (
            {"sampler": "no_such_module:Sampler"},
            "--sampler no_such_module:Sampler: No module named",
        ),
        ({"sampler": "json:JSONDecoder"}, "json:JSONDecoder is no class of an Optuna sampler"),
        ({"sampler": "json:Sampler"}, "module 'json' has no attribute 'Sampler'"),
    ],
)
def test_python_refuses_what_the_command_line_refuses(folder, tmp_path, wrong, rule):
    with pytest.raises(ConfigError, match=rule):
        package.search(folder / "model", budget_bpe=9, out=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()
