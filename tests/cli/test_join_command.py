"""`autoquant join` against a search that others run; tests/ranks has those that measure."""

import re
import shutil

import optuna
import pytest
from safetensors.torch import load_file, save_file
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.measure.ranks.ranks import ALONE
from autoquant.run.config import JoinConfig
from autoquant.run.machines import joining
from autoquant.run.opening import open_plan
from autoquant.study.joining import link
from autoquant.study.mirror import open_storage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("join")
    save_searchable("llama", folder / "model", num_hidden_layers=2)
    save_text(folder / "text")
    other = folder / "other-model"
    shutil.copytree(folder / "model", other)
    (file,) = other.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    save_text(folder / "other-text", seed=1)
    return folder


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture
def roster(folder, url, monkeypatch):
    """The roster of a search that goes on."""
    monkeypatch.setattr(link, "INTERVAL", 0.02)
    values = {
        name[2:].replace("-", "_"): n for name, n in zip(*[iter(TOKEN_FLAGS)] * 2, strict=True)
    }
    config = JoinConfig.of(
        {
            **values,
            "model": str(folder / "model"),
            "calibration": str(folder / "text"),
            "budget_bpe": [10, 12],
            "trials_at_once": 2,
            "study_storage": url,
        }
    )
    with joining.roster_of(config, open_plan(config), open_storage(url), "mine", ALONE) as roster:
        yield roster


@pytest.fixture
def join(autoquant, folder, url):
    def call(*flags, model="model", text="text"):
        return autoquant(
            *("join", folder / model, "--calibration", folder / text, *TOKEN_FLAGS),
            *("--budget-bpe", "10,12", "--trials-at-once", 2, "--study-storage", url, *flags),
        )

    return call


def registered(url):
    return optuna.load_study(study_name="mine, workers", storage=url).trials


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"flags": ("--seed", 1)}, "seed is 0 there and 1 here"),
        (
            {"flags": ("--budget-bpe", "10")},
            r"budget_bpe is \[10.0, 12.0\] there and",
        ),
        ({"model": "other-model"}, "the content digest of the model is 'sha256:"),
    ],
)
def test_a_worker_with_another_model_or_settings_is_refused_before_anything_is_loaded(
    join, roster, url, monkeypatch, changes, said
):
    monkeypatch.setattr(joining, "open_to_probe", lambda *_: pytest.fail("it was loaded"))
    done = join(*changes.pop("flags", ()), **changes)
    assert done.exit_code == 2
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert re.search(f"^error: the search 'mine' is another than this worker's: {said}", error)
    assert "fix: give the worker the settings, model files, installation and kind of" in done.stderr
    assert registered(url) == []


def test_a_worker_with_another_version_is_refused(join, roster, monkeypatch):
    ours = joining.measuring_on
    monkeypatch.setattr(joining, "measuring_on", lambda device: ours(device) | {"torch": "1.0"})
    done = join()
    assert done.exit_code == 2
    assert re.search("torch is '.*' there and '1.0' here", done.stderr)


def test_a_worker_with_another_text_is_refused_before_it_registers(join, roster, url):
    roster.offer({"tokens": {"calibration": "1", "search": "2"}, "calibration": {}})
    done = join(text="other-text")
    assert done.exit_code == 2
    assert "other-text' or the tokenizer gives other tokens here than in the search" in done.stderr
    assert registered(url) == []


def test_a_search_that_ends_meanwhile_ends_its_worker(join, roster, url, monkeypatch):
    ours = joining.open_to_probe

    def over(*given):
        optuna.delete_study(study_name="mine, workers", storage=url)
        return ours(*given)

    monkeypatch.setattr(joining, "open_to_probe", over)
    done = join()
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "mine has ended; 0 of its trials were measured here.\n"


def test_a_storage_that_does_not_answer_is_exit_5(join, tmp_path):
    done = join("--study-storage", f"sqlite:///{tmp_path / 'no' / 'study.db'}")
    assert done.exit_code == 5
    assert "does not answer" in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--trials-at-once", 1), "--trials-at-once is 1, and workers share the trials of a round"),
        (("--workers", 2), "--workers 2: what joins a search is one worker"),
    ],
)
def test_what_cannot_be_shared_is_a_wrong_setting(join, flags, said):
    done = join(*flags)
    assert done.exit_code == 2
    assert said in done.stderr


def test_a_worker_without_a_storage_has_nowhere_to_go(autoquant):
    done = autoquant("join", "--budget-bpe", 5, "--trials-at-once", 2)
    assert done.exit_code == 2
    assert "--study-storage is missing: a worker meets its search there" in done.stderr
