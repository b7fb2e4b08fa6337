"""`autoquant probe`, and searches that take its probes over."""

import json
import shutil

import pytest
import yaml
from click.testing import CliRunner
from records import forget_checksums
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.cli import cli
from autoquant.cli.terminal import Terminal
from autoquant.codes.statistics import StatisticsStore
from autoquant.forward.backward import Backward
from autoquant.measure.scorer import Scorer

BUDGET = 8.5
PROBE_FLAGS = tuple(
    flag
    for name, value in zip(TOKEN_FLAGS[::2], TOKEN_FLAGS[1::2], strict=True)
    if name != "--report-tokens"
    for flag in (name, value)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    save_searchable("qwen3_moe", folder / "model")
    save_text(folder / "text")
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.stderr
    return result


@pytest.fixture(scope="module")
def probe(folder):
    def call(*flags, code=0):
        calibration = ("--calibration", folder / "text")
        method = ("--probe", "exact")
        return run(
            "probe", folder / "model", *calibration, *PROBE_FLAGS, *method, *flags, code=code
        )

    return call


@pytest.fixture(scope="module")
def search(folder):
    def call(*flags, code=0):
        return run(
            *("search", folder / "model", "--calibration", folder / "text", *TOKEN_FLAGS),
            *("--budget-bpe", BUDGET, "--trials", 0, "--no-export", "--no-mlflow"),
            *("--probe", "exact", *flags),
            code=code,
        )

    return call


@pytest.fixture(scope="module")
def exact(folder, probe):
    """Finished exact probes, which no test changes, and what the command printed."""
    return folder / "exact", probe("--out", folder / "exact")


@pytest.fixture(scope="module")
def screened(folder, probe):
    return folder / "screened", probe("--probe", "screened", "--out", folder / "screened")


def sensitivities(run):
    data = json.loads((run / "sensitivity.json").read_text())
    return data["method"], {(p["group"], p["choice"]): p["kl"] for p in data["probes"]}


def records(run, name):
    path = run / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def means(probes):
    """KL of each (group, choice) over the batches of `probes`, nats per token."""
    sums, tokens = {}, {}
    for p in probes:
        key = p["group"], p["choice"]
        sums[key] = sums.get(key, 0.0) + p["kl_sum"]
        tokens[key] = tokens.get(key, 0) + p["tokens"]
    return {key: sums[key] / tokens[key] for key in sums}


def no_probe(*_, **__):
    raise AssertionError("a probe was measured")


def test_every_group_is_probed_in_every_format(exact):
    run, printed = exact
    method, kl = sensitivities(run)
    assert method == "exact"
    plan = json.loads((run / "groups.json").read_text())
    wanted = {(g["name"], c) for g in plan["groups"] for c in g["choices"] if len(g["choices"]) > 1}
    assert kl.keys() == {key for key in wanted if key[1] != "bf16"}
    assert all(value > 0.0 for value in kl.values())
    header = next(line for line in printed.stdout.splitlines() if line.startswith("group"))
    plain, fitted = ("max", "mse", "four_over_six"), ("mse/gptq", "hessian/gptq")
    assert header.split() == [
        "group",
        *(f"nvfp4/{own}" for own in plain + fitted),
        "fp8",
        "fp8/gptq",
    ]
    assert f"autoquant search --probe exact --budget-bpe BITS --sensitivity {run}" in printed.stdout


def test_the_same_command_shows_the_probes_again(exact, probe, monkeypatch):
    run, _ = exact
    monkeypatch.setattr(Scorer, "probe", no_probe)
    again = probe("--out", run, "--format", "json")
    assert "already holds these probes" in again.stderr
    result = json.loads(again.stdout)
    stored = json.loads((run / "sensitivity.json").read_text())
    del stored["checksum"]
    assert {name: result[name] for name in stored} == stored
    assert result["run"] == str(run)


def test_gradients_alone_rank_like_exact_probes(exact, probe, tmp_path):
    probe("--probe", "gradient", "--out", tmp_path / "gradient")
    method, kl = sensitivities(tmp_path / "gradient")
    assert method == "gradient"
    assert not (tmp_path / "gradient" / "sensitivity.jsonl").exists()
    _, measured = sensitivities(exact[0])
    assert kl.keys() == measured.keys()
    best, worst = min(measured, key=measured.get), max(measured, key=measured.get)
    assert kl[best] < kl[worst]
    again = tmp_path / "again"
    probe("--probe", "gradient", "--out", again)
    assert sensitivities(again) == (method, kl)
    assert {record["method"] for record in records(again, "gradient.jsonl")} == {"gradient"}


def test_screened_probes_measure_one_choice_of_each_group(exact, screened):
    run, printed = screened
    method, kl = sensitivities(run)
    _, measured = sensitivities(exact[0])
    assert method == "screened"
    assert kl.keys() == measured.keys()
    probed = {(record["group"], record["choice"]) for record in records(run, "sensitivity.jsonl")}
    groups = [group for group, _ in probed]
    assert len(groups) == len(set(groups)) > 0
    on_half = means(records(run, "sensitivity.jsonl"))
    estimates = [p for record in records(run, "gradient.jsonl") for p in record["probes"]]
    everywhere, half = means(estimates), means([p for p in estimates if p["batch"] % 2 == 0])
    for key in probed:
        assert kl[key] == pytest.approx(on_half[key] * everywhere[key] / half[key])
        assert kl[key] == pytest.approx(measured[key], rel=0.3)
    # Groups that together do less than the noise keep their estimates.
    left_out = {key: value for key, value in kl.items() if key[0] not in groups}
    assert sum(left_out.values()) < json.loads((run / "noise.json").read_text())["kl"] * 4
    assert "autoquant search --budget-bpe BITS" in printed.stdout


def test_an_interrupted_probe_goes_on_to_the_same_end(screened, probe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    arguments = ("--probe", "screened", "--out", run)
    for begun in ("gradient.jsonl", "sensitivity.jsonl"):
        with monkeypatch.context() as patched:

            def stop(terminal, count=1, begun=begun):
                if records(run, begun):
                    raise KeyboardInterrupt

            patched.setattr(Terminal, "step", stop)
            stopped = probe(*arguments, code=130)
        assert "to go on from here" in stopped.stderr
        assert not (run / "sensitivity.json").exists()
        assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    whole = len(records(screened[0], "sensitivity.jsonl"))
    assert 0 < len(records(run, "sensitivity.jsonl")) < whole
    probe(*arguments)
    for name in (
        *("sensitivity.json", "sensitivity.jsonl", "gradient.jsonl"),
        *("calibration.json", "noise.json"),
    ):
        assert (run / name).read_bytes() == (screened[0] / name).read_bytes()


def test_a_model_without_a_backward_pass_is_probed_exactly(exact, probe, tmp_path, monkeypatch):
    def visit(backward, stage):
        raise NotImplementedError("derivative for fused_scan is not implemented")

    monkeypatch.setattr(Backward, "visit", visit)
    result = probe("--probe", "screened", "--out", tmp_path / "run")
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning")]
    (warning,) = [line for line in warnings if "without gradients" in line]
    assert "fused_scan" in warning
    assert any("all tokens as equally important" in line for line in warnings)
    (method, kl), (_, measured) = (sensitivities(run) for run in (tmp_path / "run", exact[0]))
    assert method == "exact"
    assert kl.keys() == measured.keys()
    for key, value in kl.items():
        fits = key[1].endswith("gptq")
        assert value == (pytest.approx(measured[key], rel=0.3) if fits else measured[key]), key


@pytest.fixture(scope="module")
def alone(folder, search):
    """A search that made its own probes."""
    search("--out", folder / "alone")
    return folder / "alone"


def outcome(run):
    result = json.loads((run / "result.json").read_text())
    for row in result["stages"]:
        row.pop("seconds")
    left_out = ("seconds", "command", "checksum")
    return {name: value for name, value in result.items() if name not in left_out}


@pytest.mark.slow
def test_a_search_with_given_probes_ends_as_one_that_made_them(
    exact, alone, search, tmp_path, monkeypatch
):
    monkeypatch.setattr(Scorer, "probe", no_probe)
    with monkeypatch.context() as patch:
        patch.setattr(StatisticsStore, "write", None)  # those of the probes are there
        search("--sensitivity", exact[0], "--out", tmp_path / "run")
    for name in ("statistics", "codes"):
        theirs = {file.name: file.read_bytes() for file in (exact[0] / name).iterdir()}
        ours = {file.name: file.read_bytes() for file in (tmp_path / "run" / name).iterdir()}
        assert theirs.items() <= ours.items(), name
        assert theirs
    assert outcome(tmp_path / "run") == outcome(alone)
    search("--sensitivity", alone, "--budget-bpe", 9, "--out", tmp_path / "other")
    assert sensitivities(tmp_path / "other") == sensitivities(exact[0])


@pytest.mark.slow
def test_a_search_finds_probes_of_the_same_settings_by_itself(probe, search, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    probe("--probe", "gradient")
    (run,) = (tmp_path / "runs").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(Backward, "visit", no_probe)
        found = search("--probe", "gradient", "--out", tmp_path / "out")
    assert f"probes: runs/{run.name}" in found.stderr
    assert sensitivities(tmp_path / "out") == sensitivities(run)
    settings = yaml.safe_load((tmp_path / "out" / "config.resolved.yaml").read_text())
    assert settings["probe"] == "gradient"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["signature"]["probe"] == (
        "gradient"
    )


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (("--seed", 7), "seed is 0 there and 7 here"),
        (("--probe", "gradient"), "probe is 'exact' there and 'gradient' here"),
        (("--search-tokens", 256), "'search': 512"),
    ],
)
def test_probes_of_other_settings_are_refused(exact, search, tmp_path, flags, difference):
    result = search("--sensitivity", exact[0], "--out", tmp_path / "run", *flags, code=5)
    assert difference in result.stderr
    assert "or leave --sensitivity out" in result.stderr
    assert not (tmp_path / "run").exists()


def test_probes_of_a_changed_text_are_refused(exact, folder, tmp_path):
    text = save_text(tmp_path / "elsewhere" / "text", seed=5)
    copy = shutil.copytree(exact[0], tmp_path / "copy")
    forget_checksums(copy)
    identity = json.loads((copy / "run.json").read_text())
    identity["signature"]["calibration"] = str(text)
    (copy / "run.json").write_text(json.dumps(identity))
    result = run(
        *("search", folder / "model", "--calibration", text, *TOKEN_FLAGS, "--no-mlflow"),
        *("--budget-bpe", BUDGET, "--probe", "exact"),
        *("--sensitivity", copy, "--out", tmp_path / "run"),
        code=5,
    )
    assert "the tokenizer has changed since" in result.stderr


def test_a_folder_without_probes_is_refused(search, tmp_path):
    result = search("--sensitivity", tmp_path, "--out", tmp_path / "run", code=2)
    assert f"{tmp_path} is no run directory" in result.stderr
    result = search("--sensitivity", tmp_path / "no", "--out", tmp_path / "run", code=2)
    assert "is no run directory" in result.stderr
    assert not (tmp_path / "run").exists()


def test_unfinished_probes_are_refused(exact, search, tmp_path):
    copy = shutil.copytree(exact[0], tmp_path / "copy")
    (copy / "sensitivity.json").unlink()
    result = search("--sensitivity", copy, "--out", tmp_path / "run", code=2)
    assert f"the probes of {copy} are not finished" in result.stderr


def test_damaged_probes_are_named(exact, search, tmp_path):
    copy = shutil.copytree(exact[0], tmp_path / "copy")
    (copy / "sensitivity.json").write_text("{")
    result = search("--sensitivity", copy, "--out", tmp_path / "run", code=4)
    assert f"{copy / 'sensitivity.json'} is damaged" in result.stderr


def test_a_search_does_not_write_into_a_directory_of_probes(exact, search):
    run, _ = exact
    before = {path.name for path in run.iterdir()}
    result = search("--out", run, code=5)
    assert "holds probes alone" in result.stderr
    assert f"give --sensitivity {run} and another --out" in result.stderr
    assert {path.name for path in run.iterdir()} == before


def test_probes_do_not_write_into_another_run(exact, probe):
    result = probe("--seed", 1, "--out", exact[0], code=5)
    assert "seed is 0 there and 1 here" in result.stderr


def test_an_unknown_method_is_refused(probe, tmp_path):
    result = probe("--probe", "hessian", "--out", tmp_path / "run", code=2)
    assert "'hessian' is not one of" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_space_that_leaves_nothing_open_is_refused(probe, tmp_path):
    space = tmp_path / "none.yaml"
    space.write_text("schema_version: 1\nname: none\nrules:\n  - {match: '*', formats: [bf16]}\n")
    result = probe("--space", space, "--out", tmp_path / "run", code=2)
    assert "leaves no layer of" in result.stderr
    assert not (tmp_path / "run").exists()


def test_too_little_text_is_told(folder, tmp_path):
    (tmp_path / "text.txt").write_text("a few words")
    result = run(
        *("probe", folder / "model", "--calibration", tmp_path / "text.txt"),
        *("--out", tmp_path / "run"),
        code=4,
    )
    assert "leaves no sequence" in result.stderr


def test_probes_can_be_reported(exact, tmp_path):
    run("report", exact[0], "--out", tmp_path / "report.html")
    assert "self_attn" in (tmp_path / "report.html").read_text()
