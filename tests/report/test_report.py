"""The report of a run: one page that holds all and asks for nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
from page import Page

import autoquant
from experiments.report_scale.grow import grow

PICTURES = {
    *("frontier", "map", "sensitivity", "prediction"),
    *("convergence", "tokens", "coverage", "sizes"),
}


def test_a_search_leaves_a_report_with_every_picture(html):
    page = Page(html)
    assert page.count("figure") == len(PICTURES)
    assert page.count("svg") == len(PICTURES)
    assert all("aria-label" in attributes for tag, attributes in page.tags if tag == "svg")


def test_the_report_names_the_result_the_baselines_and_what_it_rests_on(html, finished):
    result = json.loads((finished / "result.json").read_text())
    text = Page(html).text
    assert f"{result['kl']['mean']:.5f} ± {result['kl']['stderr']:.5f}" in text
    for row in result["baselines"]:
        assert f"{row['name']} {row['bpe']:.3f} {row['kl']:.5f}" in text
    for split in result["tokens"].values():
        assert split["digest"] in text
    assert result["winner"]["digest"] in text
    assert result["command"] in text
    assert "Not in this run" not in text


def test_the_report_asks_nothing_of_a_network_and_runs_nothing(html):
    page = Page(html)
    assert len(html.encode()) < 1_000_000
    assert not page.count("script") + page.count("link") + page.count("img") + page.count("iframe")
    for _, attributes in page.tags:
        for name in ("href", "xlink:href", "src"):
            assert attributes.get(name, "#").startswith("#")
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_pictures_follow_the_theme_and_keep_text_as_text(html):
    drawn = html[html.index("<body") :]
    assert "prefers-color-scheme: dark" in html
    assert "var(--nvfp4)" in drawn
    assert not re.search(r"(?:fill|stroke|color): ?#[0-9a-f]{6}", drawn)
    assert ">layer</text>" in drawn


def test_ids_are_unique_on_the_page(html):
    ids = [attributes["id"] for _, attributes in Page(html).tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0


def test_the_same_run_gives_the_same_bytes(autoquant, finished, html, tmp_path):
    done = autoquant("report", finished, "--out", tmp_path / "again.html")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "again.html").read_text() == html


@pytest.mark.slow
def test_every_picture_as_a_png(autoquant, finished, tmp_path):
    out = tmp_path / "page.html"
    done = autoquant("report", finished, "--out", out, "--png", tmp_path / "a" / "b")
    assert done.exit_code == 0, done.stderr
    files = {path.stem: path for path in (tmp_path / "a" / "b").iterdir()}
    assert files.keys() == PICTURES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files.values())


def test_json_says_what_was_written(autoquant, finished, tmp_path):
    done = autoquant("report", finished, "--out", tmp_path / "r.html", "--format", "json")
    printed = json.loads(done.stdout)
    assert printed["report"] == str(tmp_path / "r.html")
    assert printed["status"] == "finished"
    assert printed["missing"] == []
    assert "nats per token" in printed["verdict"]


@pytest.mark.slow
def test_short_text_and_experts_with_few_tokens_are_told(autoquant, run):
    result = json.loads((run / "result.json").read_text())
    result["tokens"]["report"] |= {"tokens": 1_024, "asked": 65_536}
    few = {"experts": 8, "few": 3, "idle": 0, "tokens": 4_096, "needed": 9_000, "threshold": 64}
    (run / "result.json").write_text(json.dumps(result | {"experts": few}))
    assert autoquant("report", run).exit_code == 0
    text = Page((run / "report.html").read_text()).text
    assert "widens the intervals: report: 1,024 tokens where 65,536 were asked for" in text
    assert "search: " not in text.partition("KL against size")[0]
    assert "3 of 8 experts saw fewer than 64 of the 4,096 calibration tokens; about 9,000" in text


def test_a_result_without_what_later_versions_record_is_still_shown(autoquant, run):
    result = json.loads((run / "result.json").read_text())
    for name in ("predictions", "experts", "kv_cache", "stages"):
        result.pop(name, None)
    for split in result["tokens"].values():
        split.pop("asked", None)
    (run / "result.json").write_text(json.dumps(result))
    done = autoquant("report", run)
    assert done.exit_code == 0, done.stderr
    assert Page((run / "report.html").read_text()).count("figure") == len(PICTURES)


def test_text_of_the_evaluation_data_is_shown_and_never_interpreted(autoquant, run):
    tokens = json.loads((run / "tokens.json").read_text())
    tokens["worst"][0]["before"] = "<script>alert(1)</script>"
    (run / "tokens.json").write_text(json.dumps(tokens))
    assert autoquant("report", run).exit_code == 0
    page = Page((run / "report.html").read_text())
    assert page.count("script") == 0
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.slow
def test_a_large_run_stays_under_a_megabyte(autoquant, run):
    grow(run, layers=50, groups=600, trials=500)
    assert len(json.loads((run / "groups.json").read_text())["groups"]) == 600
    done = autoquant("report", run)
    assert done.exit_code == 0, done.stderr
    assert (run / "report.html").stat().st_size < 1_000_000


def test_an_interrupted_run_shows_what_there_is_and_names_the_rest(autoquant, interrupted):
    done = autoquant("report", interrupted)
    assert done.exit_code == 0, done.stderr
    assert "was interrupted before it was confirmed" in done.stdout
    assert "result.json" in done.stdout
    page = Page((interrupted / "report.html").read_text())
    assert page.count("figure") == len(PICTURES) - 1  # tokens alone rest on the confirmation
    assert "The same command goes on where the search stopped" in page.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "said"), [("failed", "failed"), ("running", "is still running, or was killed")]
)
def test_how_an_unfinished_run_ended_is_said(autoquant, interrupted, status, said):
    identity = json.loads((interrupted / "run.json").read_text())
    (interrupted / "run.json").write_text(json.dumps(identity | {"status": status}))
    done = autoquant("report", interrupted)
    assert done.exit_code == 0, done.stderr
    assert f"This search {said} before it was confirmed on fresh tokens" in done.stdout
    assert f"Not in this run ({status}):" in Page((interrupted / "report.html").read_text()).text


def test_a_run_that_failed_in_its_probes_shows_the_finished_ones(autoquant, interrupted):
    (interrupted / "sensitivity.json").unlink()
    (interrupted / "trials.jsonl").unlink()
    log = (interrupted / "sensitivity.jsonl").read_text().splitlines(keepends=True)
    (interrupted / "sensitivity.jsonl").write_text("".join(log[:3]))
    done = autoquant("report", interrupted, "--format", "json")
    printed = json.loads(done.stdout)
    assert any(name.startswith("probes: ") for name in printed["missing"])
    assert "no assignment within the budget is measured yet" in printed["verdict"]
    page = Page((interrupted / "report.html").read_text())
    labels = {attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"}
    assert labels == {
        "Format and sensitivity of every layer group",
        "The most sensitive layer groups",
        "Calibration tokens per expert",
    }


def test_a_run_that_failed_at_once_still_has_a_report(autoquant, interrupted):
    for path in interrupted.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "run.json":
            path.unlink()
    done = autoquant("report", interrupted, "--format", "json")
    assert done.exit_code == 0, done.stderr
    assert len(json.loads(done.stdout)["missing"]) == 6


def age(path) -> None:
    """Make a file of the run one of an older schema."""
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 0'))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("run.json", len(PICTURES)),
        ("result.json", len(PICTURES)),
        ("trials.jsonl", len(PICTURES) - 4),
        ("sensitivity.json", len(PICTURES)),
        ("groups.json", len(PICTURES) - 3),
    ],
)
def test_a_run_of_an_older_schema_shows_what_there_is_and_names_the_rest(
    autoquant, run, name, pictures
):
    age(run / name)
    before = (run / "report.html").read_bytes()
    done = autoquant("report", run, "--format", "json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    said = f"{name}: another version of AutoQuant wrote it, in schema 0; this one reads 1"
    assert printed["missing"][-1] == said
    page = Page(Path(printed["report"]).read_text())
    assert said in page.text
    assert page.count("figure") == pictures
    assert (run / "report.html").read_bytes() == before, "of the version that could read it all"


def test_a_run_all_of_an_older_schema_still_has_a_report(autoquant, run):
    for path in (*run.glob("*.json"), *run.glob("*.jsonl")):
        age(path)
    change = json.loads((run / "run.json").read_text()) | {"signature": None, "status": "done"}
    (run / "run.json").write_text(json.dumps(change))
    done = autoquant("report", run)
    assert done.exit_code == 0, done.stderr
    assert "recorded by another version of AutoQuant (0." in done.stdout
    for name in ("run.json", "result.json", "trials.jsonl", "groups.json", "tokens.json"):
        assert f"{name}: another version" in done.stdout


def test_a_folder_that_is_no_run_is_refused(autoquant, tmp_path):
    done = autoquant("report", tmp_path)
    assert done.exit_code == 2
    assert f"{tmp_path} is not a run directory: it has no run.json" in done.stderr
    assert "fix: name the folder that `autoquant search` printed" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_refused(autoquant, tmp_path):
    done = autoquant("report", tmp_path / "nowhere")
    assert done.exit_code == 2
    assert "there is no such folder" in done.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_trial_without_its_kl_is_damage_and_not_a_bug(autoquant, run):
    path = run / "trials.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[1]["kl"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = autoquant("report", run)
    assert done.exit_code == 4
    assert "is damaged: a record in it lacks 'kl'" in done.stderr


def test_a_report_for_a_folder_that_does_not_exist_is_refused(autoquant, finished, tmp_path):
    done = autoquant("report", finished, "--out", tmp_path / "no" / "report.html")
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr
    assert "fix: name a file in a folder that exists" in done.stderr


@pytest.mark.slow
def test_a_report_that_fails_never_loses_a_search(settings, finished, tmp_path, monkeypatch):
    from autoquant.run.observer import Logged

    class Watcher(Logged):
        def __init__(self) -> None:
            self.warnings: list[str] = []

        def warn(self, message: str) -> None:
            self.warnings.append(message)

    def fail(record):
        raise OSError("the paper is jammed")

    # The finished run without its last word: the search goes on from its trials.
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("result.json", "report.html", "tokens.json"):
        (run / name).unlink()
    monkeypatch.setattr("autoquant.report.html.render", fail)
    watcher = Watcher()
    found = autoquant.search(**settings, out=run, observer=watcher)
    assert found.result == autoquant.load_run(finished).result | {
        "command": found.result["command"],
        "seconds": found.result["seconds"],
    }
    assert "report.html could not be written: OSError: the paper is jammed" in watcher.warnings
    assert not (run / "report.html").exists()
