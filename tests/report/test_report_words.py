"""The words of a report: how sensitivities were found, what the budget counts, what stages gave."""

import json
import re

import pytest
from page import Page, change, page_of

from autoquant.report.record import RunRecord

pytestmark = pytest.mark.slow


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
    assert f"Budget 9 {said}, of which the assignment takes {taken:.4f}" in text
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
