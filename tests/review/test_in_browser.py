"""What a reviewer opens: the report and MLflow's page of a search, in a browser."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState
from pages import (
    CHROMIUM,
    COMPARED,
    FRONTIER,
    LAYER_MAP,
    chromium,
    cut_off,
    open_study,
    picture,
    report_of,
    run_address,
)
from searchable import TOKEN_FLAGS, save_searchable, save_text
from servers import mlflow_server, optuna_dashboard

from autoquant.api import search
from autoquant.evaluate.evaluated import Candidate, Evaluation
from autoquant.evaluate.scores import Metric, TaskScore
from autoquant.store.run_directory import EVALUATION, write_json
from autoquant.study.journal import read_study

pytest.importorskip("playwright", reason="playwright is absent: pip install 'autoquant[test]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is absent: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished search with its checkpoint, recorded in the store beside it."""
    folder = tmp_path_factory.mktemp("review")
    flags = dict(zip(TOKEN_FLAGS[::2], TOKEN_FLAGS[1::2], strict=True))
    return search(
        save_searchable("qwen3_moe", folder / "model"),
        calibration=str(save_text(folder / "text")),
        budget_bpe=9.0,
        trials=6,
        out=folder / "runs" / "reviewed",
        **{flag.lstrip("-").replace("-", "_"): value for flag, value in flags.items()},
    ).path


@pytest.fixture(scope="module")
def baselines(run) -> list[str]:
    result = json.loads((run / "result.json").read_text())
    return [row["name"] for row in result["baselines"]]


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def test_the_report_reads_on_a_screen_a_phone_and_in_the_dark(run, baselines, browser):
    page = browser.open(report_of(run))
    for label in (FRONTIER, LAYER_MAP):
        assert picture(page, label).bounding_box()["width"] > 400
    for name in baselines:
        assert page.get_by_role("cell", name=name, exact=True).first.is_visible()
    assert cut_off(page) == []
    phone = browser.open(report_of(run), width=390, height=800)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    assert phone.evaluate(
        """[...document.querySelectorAll("figure")].every(f => f.scrollWidth <= f.clientWidth)"""
    ), "pictures are whole on a phone"
    paper = browser.open(report_of(run))
    paper.emulate_media(media="print")
    for text in ("Where the output changed most", "Finalists against"):
        inside = paper.locator("details", has_text=text).locator("p").first
        assert inside.bounding_box()["height"] > 0, "what is folded on a screen is printed"
    next_token = paper.locator("mark").first
    colour = "mark => getComputedStyle(mark).color"
    assert next_token.evaluate(colour) == paper.evaluate("getComputedStyle(document.body).color")
    dark = browser.open(report_of(run), color_scheme="dark")
    shade = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(shade) == "rgb(255, 255, 254)"
    assert dark.evaluate(shade) == "rgb(21, 24, 30)"
    assert browser.errors == []


def test_runs_side_by_side_read_on_a_screen_and_a_phone(run, autoquant, browser, tmp_path):
    page = tmp_path / "compared.html"
    assert autoquant("compare", run, run, "--out", page).exit_code == 0
    screen = browser.open(page.as_uri(), width=1280)
    assert picture(screen, COMPARED).bounding_box()["width"] > 400
    table = screen.locator(".scroll")
    assert table.evaluate("t => t.scrollWidth <= t.clientWidth"), "no column is cut off"
    assert cut_off(screen) == []
    phone = browser.open(page.as_uri(), width=390, height=800)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.errors == []


def test_a_winner_with_a_long_name_pushes_no_column_out_of_sight(run, browser):
    page = browser.open(report_of(run), width=900)
    page.evaluate(
        """() => document.querySelector("tr.lead td").textContent =
            "the winner: swap: model.layers.4.block_sparse_moe.experts to nvfp4/mse/gptq, "
            + "model.layers.5.self_attn.qkv to nvfp4/mse/gptq" """
    )
    table = page.locator(".scroll").first
    assert table.evaluate("t => t.scrollWidth <= t.clientWidth")
    assert browser.errors == []


def test_no_column_of_the_tasks_is_cut_off(run, autoquant, browser, tmp_path):
    names = "bf16", "uniform nvfp4", "winner"
    items = [float(number % 3 > 0) for number in range(10_042)]
    metric = Metric(name="exact_match (strict-match)", value=0.2, higher_is_better=True)
    scores = [
        TaskScore(
            name=name,
            assignment=name,
            task="gsm8k_held_out",
            items=len(items),
            digest="d",
            shots=5,
            metrics=(replace(metric, items=(*items[number:], *items[:number])),),
        )
        for number, name in enumerate(names)
    ]
    found = Evaluation(
        model="m",
        target="blackwell",
        candidates=tuple(
            Candidate(name=own, digest=own, bpe=16.0, kl=0.1, stderr=0.1) for own in names
        ),
        scores=tuple(scores),
    )
    copy = tmp_path / "evaluated"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint"))
    write_json(copy, EVALUATION, found.to_dict())
    assert autoquant("report", copy).exit_code == 0
    page = browser.open(report_of(copy), width=900)
    table = page.locator("h2:has-text('Tasks') + .scroll")
    assert table.get_by_role("cell", name="10,042").count() == len(names)
    assert table.evaluate("t => t.scrollWidth <= t.clientWidth")


def test_mlflow_shows_the_result_the_baselines_the_checkpoint_and_the_report(
    run, baselines, browser
):
    store = MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    experiment = store.get_experiment_by_name("autoquant").experiment_id
    run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    with mlflow_server(run.parent) as server:
        page = browser.open(run_address(server.url, experiment, run_id))
        for name in baselines:
            page.get_by_role("cell", name=name, exact=True).wait_for()
        page.get_by_role("link", name=run.name, exact=True).first.wait_for()
        page = browser.open(run_address(server.url, experiment, run_id, "/artifacts/report.html"))
        report = page.frame_locator("iframe")
        for label in (FRONTIER, LAYER_MAP):
            picture(report, label).wait_for()
        for name in baselines:
            report.get_by_role("cell", name=name, exact=True).first.wait_for()
    assert browser.errors == []


def test_the_dashboard_shows_the_study_by_group_and_in_time(run, browser, tmp_path):
    study = read_study(run)
    groups = [*study.trials[0].distributions]
    with optuna_dashboard(run / "study.log", tmp_path / "dashboard.log") as server:
        page = open_study(browser, server.url)
        for label in ("Parallel Coordinate", "History"):
            assert page.get_by_role("heading", name=label).is_visible()
        axes = page.locator(".parcoords .axis-title")
        assert axes.count() == 1 + len(groups)  # and the KL
        points = page.locator(".scatterlayer .points path")
        assert points.count() == len(study.get_trials(states=(TrialState.COMPLETE,)))
    assert browser.errors == []
