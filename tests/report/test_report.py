"""The report of a run: one page that holds all and asks for nothing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import autoquant
from autoquant.report.record import RunRecord
from experiments.report_scale.grow import grow

PICTURES = {
    *("frontier", "map", "sensitivity", "prediction"),
    *("convergence", "tokens", "coverage", "sizes"),
}


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def html(finished) -> str:
    return (finished / "report.html").read_text()


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
    assert "no mix within the budget is measured yet" in printed["verdict"]
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
    from autoquant.run.observer import Silent

    class Watcher(Silent):
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


def change(path: Path, **values) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def page_of(autoquant, run) -> Page:
    """The run's report, written anew."""
    done = autoquant("report", run)
    assert done.exit_code == 0, done.stderr
    return Page((run / "report.html").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fit", "said"),
    [
        ({"share": 1.0, "strength": 0.0}, "Right, the sum, mapped by"),
        (
            {"share": 1.0, "strength": -0.1},
            "Right, the sum, minus 0.10 times the interactions of all pairs of groups, mapped by",
        ),
        (
            {"share": None, "strength": 0.4},
            "Right, the sum, plus 0.40 times the interactions of all pairs of groups, mapped by",
        ),
        (
            {"share": 0.25, "strength": 0.0},
            "Right, the sum of the gradients' estimates and of 0.25 of what probes exceed them by, "
            "mapped by",
        ),
        (
            {"share": 0.0, "strength": 0.05},
            "Right, the sum of the gradients' estimates, plus 0.05 times the interactions",
        ),
    ],
)
def test_the_fit_of_predictions_reads_as_a_sentence(autoquant, run, fit, said):
    found = json.loads((run / "result.json").read_text())["predictions"] | fit
    change(run / "result.json", predictions={k: v for k, v in found.items() if v is not None})
    text = page_of(autoquant, run).text
    assert said in text
    assert ("interactions" in text) == (fit["strength"] != 0)


def test_errors_of_predictions_are_those_of_the_result(autoquant, run):
    trials = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    predictions = json.loads((run / "result.json").read_text())["predictions"]
    stopped = next(row for row in trials if row["number"] == predictions["trials"][-1]["trial"])
    stopped["is_stopped"] = True
    (run / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trials))
    text = page_of(autoquant, run).text
    error = predictions["relative_error"]
    shown = re.findall(r"off by ([\d.]+) %", text)
    assert shown == [f"{100 * error[name]:.1f}" for name in ("sum", "with_interactions")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cost", "scope", "said"),
    [
        ("bits", "searched", "bits per element of the searched layers"),
        ("active-bytes", "checkpoint", "active bits per element"),
        ("active-bytes", "searched", "active bits per element of the searched layers"),
    ],
)
def test_the_figure_that_the_budget_counts_comes_first(autoquant, run, cost, scope, said):
    """Also in results from before they named their limits."""
    settings = {"cost": cost, "budget_scope": scope}
    active = {"bytes_per_token": 1, "bpe": {"checkpoint": 8.25, "searched": 8.125}}
    result = json.loads((run / "result.json").read_text()) | settings | {"active": active}
    del result["limits"]
    (run / "result.json").write_text(json.dumps(result))
    signature = json.loads((run / "run.json").read_text())["signature"]
    change(run / "run.json", signature=signature | settings)
    taken = (active if cost == "active-bytes" else result)["bpe"][scope]
    stored = f"the checkpoint stores {result['bpe']['checkpoint']:.3f}"
    text = page_of(autoquant, run).text
    assert f"At {taken:.3f} {said} (budget 9; {stored}" in text
    assert f"Budget 9 {said}, of which the mix takes {taken:.4f}" in text
    assert f"BPE is of the whole checkpoint as stored; the budget of 9 counts {said}" in text
    assert text.count("budget 9") == 1, "no line on an axis of stored bits"
    compared = run / "compared.html"
    assert autoquant("compare", run, run, "--out", compared).exit_code == 0
    assert f"the budget of 9 counts {said}" in Page(compared.read_text()).text


def test_a_budget_of_stored_bits_is_a_line_on_their_axis(html):
    text = Page(html).text
    assert re.search(r"At [\d.]+ bits per element \([\d.]+ kB, budget 9\)", text)
    assert text.count("budget 9") > 1
    assert "BPE is of the whole checkpoint" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("exact", "measured with all else in BF16."),
        ("screened", "measured in one choice of each group on every second batch of tokens"),
        ("gradient", "estimated by gradients, not measured."),
    ],
)
def test_how_sensitivities_were_found_is_said(autoquant, run, method, said):
    change(run / "sensitivity.json", method=method)
    assert said in page_of(autoquant, run).text


def test_how_far_a_screened_run_came_is_said(autoquant, interrupted):
    plan = json.loads((interrupted / "groups.json").read_text())
    groups = sum(len(group["choices"]) > 1 for group in plan["groups"])
    (interrupted / "sensitivity.json").unlink()
    (interrupted / "trials.jsonl").unlink()
    log = interrupted / "sensitivity.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    estimate = {"schema_version": 1, "method": "gradient", "batch": 0, "probes": []}
    (interrupted / "gradient.jsonl").write_text(json.dumps(estimate) + "\n")
    text = page_of(autoquant, interrupted).text
    assert f"probes: 2 of at most {groups} begun, one choice of a group on every second" in text
    log.unlink()
    assert "probes: gradients alone, batches done: 1" in page_of(autoquant, interrupted).text


def test_a_stage_shows_its_own_best_and_not_an_earlier_stages(autoquant, run):
    path = run / "trials.jsonl"
    first = json.loads(path.read_text().splitlines()[0]) | {"fits": True, "is_stopped": False}
    rows = [("solver", 0.5), ("rules", 0.25), ("solver", 0.375)]
    trials = [first | {"number": n, "stage": s, "kl": kl} for n, (s, kl) in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in trials))
    text = page_of(autoquant, run).text
    assert re.search(r"solver 2 0 \S+ s 0\.37500 -", text)
    assert re.search(r"rules 1 0 \S+ s 0\.25000 50\.00%", text)


def test_a_report_and_a_result_have_one_table_of_stages(finished):
    result = json.loads((finished / "result.json").read_text())
    assert RunRecord.read(finished).stages() == result["stages"]
    assert sum(row["trials"] for row in result["stages"]) == result["trials"]
