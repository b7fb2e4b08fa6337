"""ModelOpt's own search on a run's tokens, beside what the run picked."""

import json
import shutil

import pytest
from records import forget_checksums
from searchable import TOKEN_FLAGS, save_searchable, save_text

import autoquant

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run directory that no test changes but by what `compare` adds."""
    folder = tmp_path_factory.mktemp("compared")
    flags = dict(zip(TOKEN_FLAGS[::2], TOKEN_FLAGS[1::2], strict=True))
    return autoquant.search(
        save_searchable("llama", folder / "model", initializer_range=0.2),
        budget_bpe=9.0,
        calibration=str(save_text(folder / "text")),
        trials=4,
        mlflow=False,
        export=False,
        out=folder / "run",
        **{flag.lstrip("-").replace("-", "_"): value for flag, value in flags.items()},
    ).path


def test_modelopts_choices_stand_in_table_picture_and_json(autoquant_command, finished, tmp_path):
    done = autoquant_command(
        "compare", finished, "--with", "modelopt", "--out", tmp_path / "c.html"
    )
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "run",
        "run: ModelOpt gradient",
        "run: ModelOpt kl_div",
    ]
    assert "run: ModelOpt gradient gives" in done.stdout
    page = (tmp_path / "c.html").read_text()
    assert page.count("<svg") == 1
    assert "hollow marks" in page
    kept = json.loads((finished / "modelopt.json").read_text())
    result = json.loads((finished / "result.json").read_text())
    for pick in kept["picks"]:
        assert pick["bpe"] <= 9.0
        assert pick["kl"] > 0.8 * result["kl"]["mean"]
        assert set(pick["groups"].values()) <= {"nvfp4/max", "fp8", "bf16"}
        scored = scored_alone(autoquant_command, finished, pick, tmp_path)
        assert scored == pytest.approx(pick["kl"], rel=1e-9)


def scored_alone(autoquant_command, run, pick, tmp_path):
    """KL of a pick by `autoquant score` on the same text and tokens."""
    file = tmp_path / "pick.json"
    file.write_text(json.dumps({"schema_version": 1, "groups": pick["groups"]}))
    done = autoquant_command(
        *("score", run.parent / "model", "--assignment", file, "--format", "json"),
        *("--calibration", run.parent / "text", *TOKEN_FLAGS),
    )
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)["kl"]["mean"]


def test_what_was_measured_once_is_read_again(autoquant_command, finished, monkeypatch):
    first = autoquant_command("compare", finished, "--with", "modelopt", "--format", "json")
    monkeypatch.setattr("autoquant.modelopt.comparing.Peer", None)
    again = autoquant_command("compare", finished, "--with", "modelopt", "--format", "json")
    assert again.exit_code == 0, again.stderr
    printed = json.loads(again.stdout)
    assert printed == json.loads(first.stdout)
    assert [rival["method"] for rival in printed["rivals"]] == ["gradient", "kl_div"]


def test_runs_that_cannot_be_compared_are_refused(autoquant_command, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "modelopt.json").unlink(missing_ok=True)
    forget_checksums(run)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    done = autoquant_command("compare", run, "--with", "modelopt")
    assert done.exit_code == 2
    assert "has no result yet" in done.stderr
    result["tokens"]["search"]["digest"] = "another"
    (run / "result.json").write_text(json.dumps(result))
    done = autoquant_command("compare", run, "--with", "modelopt")
    assert done.exit_code == 5
    assert "has changed since" in done.stderr
