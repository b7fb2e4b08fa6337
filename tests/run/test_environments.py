"""A run that goes on elsewhere: recorded, told in one line, and no trial loses its number."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from records import forget_checksums, trials_of
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.cli import cli

pytestmark = pytest.mark.slow

FLAGS = (*TOKEN_FLAGS, "--budget-bpe", 9, "--trials", 0, "--probe", "gradient")
FLAGS = (*FLAGS, "--no-mlflow", "--no-export")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("environments")
    save_searchable("llama", folder / "model")
    save_text(folder / "text")
    search(folder, folder / "begun")
    return folder


def search(folder: Path, out: Path, *flags: object) -> Result:
    arguments = ("search", folder / "model", "--calibration", folder / "text", *FLAGS)
    done = CliRunner().invoke(cli, [str(a) for a in (*arguments, "--out", out, *flags)])
    assert done.exit_code == 0, done.stderr
    return done


@pytest.fixture
def begun(folder, tmp_path) -> Path:
    """A run that has lost its result, so that it goes on."""
    run = Path(shutil.copytree(folder / "begun", tmp_path / "run"))
    (run / "result.json").unlink()
    forget_checksums(run)
    return run


def change(run: Path, **environment: str) -> None:
    identity = json.loads((run / "run.json").read_text())
    identity["environments"][0] |= environment
    (run / "run.json").write_text(json.dumps(identity))


def environments(run: Path) -> list[dict[str, str]]:
    recorded = json.loads((run / "run.json").read_text())["environments"]
    assert isinstance(recorded, list)
    return recorded


def warnings(done: Result) -> list[str]:
    return [line for line in done.stderr.splitlines() if "another environment" in line]


def test_versions_kernels_and_device_are_recorded(folder):
    (recorded,) = environments(folder / "begun")
    assert recorded.keys() == {
        *("autoquant", "torch", "transformers", "kernels", "device", "products", "numerics")
    }
    assert recorded["device"].startswith("cpu")


def test_going_on_in_the_same_environment_says_nothing(folder, begun):
    assert warnings(search(folder, begun)) == []
    assert len(environments(begun)) == 1


def test_going_on_elsewhere_is_one_line_that_names_what_differs(folder, begun):
    (ours,) = environments(begun)
    change(begun, torch="1.0", device="cuda (H200)")
    (line,) = warnings(search(folder, begun))
    assert f"device cuda (H200) then, {ours['device']} now" in line
    assert f"torch 1.0 then, {ours['torch']} now" in line
    assert "transformers" not in line
    assert environments(begun) == [ours | {"torch": "1.0", "device": "cuda (H200)"}, ours]
    assert warnings(search(folder, begun)) == []  # it holds the result, and measures nothing


def test_a_run_of_two_environments_says_so_whenever_it_measures(folder, begun):
    change(begun, torch="1.0")
    for _ in range(2):
        (begun / "result.json").unlink(missing_ok=True)
        assert len(warnings(search(folder, begun))) == 1
    assert len(environments(begun)) == 2


def test_a_run_that_recorded_none_goes_on(folder, begun):
    identity = json.loads((begun / "run.json").read_text())
    ours = identity.pop("environments")
    (begun / "run.json").write_text(json.dumps(identity))
    assert warnings(search(folder, begun)) == []
    assert environments(begun) == ours


def test_probes_of_elsewhere_that_are_taken_over_are_told_too(folder, begun, tmp_path):
    change(begun, kernels="triton")
    (line,) = warnings(search(folder, tmp_path / "other", "--sensitivity", begun))
    assert "kernels triton then" in line
    assert len(environments(tmp_path / "other")) == 2


def test_a_trial_that_is_asked_for_later_than_elsewhere_keeps_its_number(folder, begun):
    """Elsewhere another order led to the second trial first, which was number 0 there."""
    log = begun / "study.log"
    trials, lines = trials_of(begun), log.read_text().splitlines(keepends=True)
    second = json.loads(lines[3])
    second["user_attrs"]["number"] = 0
    log.write_text("".join(lines[:2]) + json.dumps(second) + "\n")
    search(folder, begun)
    after = trials_of(begun)
    assert sorted(trial["number"] for trial in after) == list(range(len(trials)))
    assert {trial["digest"] for trial in after} == {trial["digest"] for trial in trials}
