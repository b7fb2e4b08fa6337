"""Runs side by side."""

import json
import shutil
from pathlib import Path


def change(path: Path, **values) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_runs_side_by_side(autoquant, finished, run):
    done = autoquant("compare", finished, run)
    assert done.exit_code == 0, done.stderr
    header, first, second = done.stdout.splitlines()[:3]
    result = json.loads((finished / "result.json").read_text())
    assert header.split()[0] == "run"
    for line in (first, second):
        assert f"{result['kl']['mean']:.5f}" in line
        assert f"{result['bpe']['checkpoint']:.3f}" in line
    assert done.stderr == ""


def test_json_and_a_page(autoquant, finished, run, tmp_path):
    out = tmp_path / "compared.html"
    done = autoquant("compare", finished, run, "--out", out, "--format", "json")
    printed = json.loads(done.stdout)
    assert [row["run"] for row in printed["runs"]] == [finished.name, run.name]
    assert printed["caveats"] == []
    page = out.read_text()
    assert page.count("<svg") == 1
    assert finished.name in page
    assert len(page.encode()) < 1_000_000


def test_runs_whose_kl_does_not_compare_say_so(autoquant, finished, run):
    result = json.loads((run / "result.json").read_text())
    result["tokens"]["report"]["digest"] = "another"
    change(run / "result.json", tokens=result["tokens"], activation_mode="w4a16")
    done = autoquant("compare", finished, run)
    assert done.exit_code == 0
    assert "warning: report tokens differ: KL compares only among" in done.stderr
    assert "warning: targets differ" in done.stderr


def test_an_unfinished_run_stands_beside_a_finished_one(autoquant, finished, interrupted, tmp_path):
    done = autoquant("compare", finished, interrupted, "--out", tmp_path / "c.html")
    assert done.exit_code == 0, done.stderr
    assert "run (interrupted)" in done.stdout
    assert "warning: run is interrupted: not confirmed on fresh tokens." in done.stderr


def test_unfinished_runs_alone_have_a_table_and_no_picture(autoquant, interrupted, tmp_path):
    done = autoquant("compare", interrupted, "--out", tmp_path / "c.html")
    assert done.exit_code == 0, done.stderr
    assert "<svg" not in (tmp_path / "c.html").read_text()


def test_one_folder_that_is_no_run_is_named_and_nothing_is_written(autoquant, finished, tmp_path):
    done = autoquant("compare", finished, tmp_path, "--out", tmp_path / "c.html")
    assert done.exit_code == 2
    assert f"{tmp_path} is not a run directory" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "c.html").exists()


def test_a_run_of_an_older_schema_stands_there_with_what_is_read(
    autoquant, finished, run, tmp_path
):
    change(run / "result.json", schema_version=0)
    change(run / "run.json", schema_version=0, signature="in one word")
    done = autoquant("compare", finished, run, "--out", tmp_path / "c.html")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[2].split()[:4] == ["run", "model", "-", "-"]
    assert (
        "run is of another version of AutoQuant, which wrote run.json, result.json" in done.stderr
    )
    assert "another version" in (tmp_path / "c.html").read_text()


def test_no_run_is_a_usage_error(autoquant):
    assert autoquant("compare").exit_code == 2


def test_a_page_in_a_folder_that_does_not_exist_is_refused(autoquant, finished, tmp_path):
    done = autoquant("compare", finished, "--out", tmp_path / "no" / "c.html")
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr


def test_models_with_equal_names_are_told_apart_by_digest(autoquant, finished, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    identity = json.loads((other / "run.json").read_text())
    identity["signature"]["model"] = "0" * 64
    (other / "run.json").write_text(json.dumps(identity))
    done = autoquant("compare", finished, other)
    assert "warning: models differ" in done.stderr


def test_runs_of_one_name_are_told_apart_by_their_folders(autoquant, run, tmp_path):
    for folder in ("seed-0", "seed-1"):
        shutil.copytree(run, tmp_path / folder / "run")
    page = tmp_path / "c.html"
    done = autoquant("compare", *sorted(tmp_path.glob("seed-*/run")), "--out", page)
    assert done.exit_code == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == [
        "seed-0/run",
        "seed-1/run",
    ]
    for name in ("seed-0/run", "seed-1/run"):
        assert page.read_text().count(name) >= 2, "in the table and in the picture"
