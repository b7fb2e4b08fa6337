"""`autoquant search`, `score` and `export` on small models, from flags to files."""

import json
import shutil

import pytest
import yaml
from records import trials_of
from safetensors import safe_open
from searchable import TOKEN_FLAGS

from autoquant.source.source import open_source
from autoquant.store.run_directory import Status

FILES = {
    "assignment.yaml",
    "calibration.json",
    "checkpoint",
    "config.resolved.yaml",
    "groups.json",
    "result.json",
    "run.json",
    "seconds.json",
    "sensitivity.json",
    "sensitivity.jsonl",
    "splits.json",
    "study.log",
    "work.jsonl",
}
BUDGET = 8.5


@pytest.fixture
def score(autoquant, model, text):
    def call(*flags, model=model):
        result = autoquant(
            "score", model, "--calibration", text, *TOKEN_FLAGS, "--format", "json", *flags
        )
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return call


def outcome(run):
    """What the same search must find again: not times, places, and the check of its export."""
    result = json.loads((run / "result.json").read_text())
    for name in ("seconds", "checkpoint", "command", "checksum", "forward"):
        result.pop(name, None)
    for row in result["stages"]:
        row.pop("seconds")
    trials = trials_of(run)
    for trial in trials:
        del trial["seconds"]
    return result, trials, (run / "assignment.yaml").read_text()


def stored_bytes(checkpoint):
    total = 0
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(
                tensors.get_tensor(name).nbytes
                for name in tensors.keys()  # noqa: SIM118
            )
    return total


def test_a_search_leaves_every_file(finished):
    run, result = finished
    assert {path.name for path in run.iterdir() if path.name != ".lock"} >= FILES
    assert json.loads((run / "run.json").read_text())["status"] == Status.FINISHED
    assert result["run"] == str(run)
    for name in FILES:
        if name.endswith(".json"):
            assert json.loads((run / name).read_text())["schema_version"] == 1


def test_the_checkpoint_keeps_the_budget_to_the_byte(finished, model):
    run, result = finished
    with safe_open(model / "model.safetensors", "pt") as source:
        elements = sum(source.get_tensor(name).numel() for name in source.keys())  # noqa: SIM118
    size = stored_bytes(run / "checkpoint")
    assert size == result["checkpoint_bytes"]
    assert result["bpe"]["checkpoint"] == 8 * size / elements <= BUDGET


def test_the_budget_is_filled(finished):
    run, result = finished
    plan = json.loads((run / "groups.json").read_text())
    assignment = yaml.safe_load((run / "assignment.yaml").read_text())["groups"]
    upgrades = [
        size - group["choices"][assignment[group["name"]]]
        for group in plan["groups"]
        for size in group["choices"].values()
    ]
    left = BUDGET * plan["elements"] / 8 - result["checkpoint_bytes"]
    assert 0 <= left < min(extra for extra in upgrades if extra > 0)


def test_the_result_is_complete(finished):
    _, result = finished
    assert 0 < result["kl"]["median"] <= result["kl"]["p99"] <= result["kl"]["max"]
    assert result["noise_floor"] < result["kl"]["mean"]
    assert {row["name"] for row in result["baselines"]} >= {"uniform nvfp4", "uniform fp8"}
    assert result["finalists"][0]["to_solver"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert sum(result["counts"].values()) == len(
        yaml.safe_load((finished[0] / "assignment.yaml").read_text())["groups"]
    )
    assert {name: split["tokens"] > 0 for name, split in result["tokens"].items()} == {
        "calibration": True,
        "search": True,
        "report": True,
    }
    units = {name: split["units"] for name, split in result["tokens"].items()}
    assert {split["unit"] for split in result["tokens"].values()} == {"document"}
    assert 2 <= units["calibration"] <= units["search"] <= units["report"]
    assert 8 <= units["report"] < result["tokens"]["report"]["sequences"]
    stages = ("load", "calibrate", "probe", "confirm", "export")
    assert all(result["seconds"][stage] > 0 for stage in stages)


def test_the_checkpoint_measures_exactly_as_the_search_did(finished, score):
    run, result = finished
    scored = score("--checkpoint", run / "checkpoint")
    assert scored["kl"] == result["kl"]
    assert scored["bpe"] == result["bpe"]["checkpoint"]
    assert scored["counts"] == result["counts"]


def test_the_assignment_measures_exactly_as_the_search_did(finished, score):
    run, result = finished
    scored = score("--assignment", run / "assignment.yaml")
    assert scored["kl"] == result["kl"]
    assert score("--assignment", run / "assignment.yaml", "--split", "search")["kl"]["mean"] == (
        pytest.approx(result["winner"]["search_kl"], abs=1e-12)
    )
    w4a16 = score("--assignment", run / "assignment.yaml", "--activation-mode", "w4a16")
    assert w4a16["kl"]["mean"] < result["kl"]["mean"]


def test_the_assignment_exports_to_the_same_checkpoint(finished, autoquant, model, text, tmp_path):
    run, _ = finished
    exported = autoquant(
        *("export", model, "--assignment", run / "assignment.yaml", "--calibration", text),
        *(*TOKEN_FLAGS, "--out", tmp_path / "out"),
    )
    assert exported.exit_code == 0, exported.stderr
    for name in ("model.safetensors", "config.json", "hf_quant_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run / "checkpoint" / name).read_bytes()
    again = autoquant(
        *("export", model, "--assignment", run / "assignment.yaml", "--out", tmp_path / "out")
    )
    assert again.exit_code == 5
    assert "exists and holds something" in again.stderr


def test_the_same_command_shows_the_result_again(finished, autoquant, model, text):
    run, result = finished
    again = autoquant(
        *("search", model, "--budget-bpe", BUDGET, "--calibration", text, *TOKEN_FLAGS),
        *("--trials", 8, "--no-mlflow", "--out", run),
    )
    assert again.exit_code == 0
    assert "already holds this search's result" in again.stderr
    assert f"{result['kl']['mean']:.5f}" in again.stdout
    assert str(run / "checkpoint") in again.stdout


@pytest.mark.slow
def test_the_same_seed_finds_the_same_and_another_takes_other_tokens(search):
    _, one = search("--no-export", out="one")
    _, two = search("--no-export", out="two")
    _, other = search("--no-export", "--seed", 1, out="other")
    assert outcome(one) == outcome(two)
    digests = [outcome(run)[0]["tokens"]["report"]["digest"] for run in (one, other)]
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_a_search_without_export_can_export_later(search, finished):
    result, run = search("--no-export", "--trials", 8)
    assert not (run / "checkpoint").exists()
    assert "the same command with --export" in result.stdout
    assert " --no-export" in json.loads((run / "result.json").read_text())["command"]
    before = outcome(run)
    result, _ = search("--trials", 8)
    assert outcome(run) == before == outcome(finished[0])
    assert " --no-export" not in json.loads((run / "result.json").read_text())["command"]
    weights = "checkpoint/model.safetensors"
    assert (run / weights).read_bytes() == (finished[0] / weights).read_bytes()
    assert str(run / "checkpoint") in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--activation-mode", "w4a16"), ("--target", "hopper")])
def test_targets_are_measured_as_they_say(search, finished, flags):
    _, run = search(*flags, "--trials", 0, "--no-export")
    result = outcome(run)[0]
    assert (result["target"], result["activation_mode"]) == ("hopper", "w4a16")
    kl = {row["name"]: row["kl"] for row in result["baselines"]}
    other = {row["name"]: row["kl"] for row in finished[1]["baselines"]}
    assert kl["uniform nvfp4"] < other["uniform nvfp4"]
    assert kl["uniform fp8"] == other["uniform fp8"]


@pytest.mark.slow
def test_ampere_multiplies_in_bf16_alone(search, finished):
    _, run = search("--target", "ampere", "--trials", 0, "--no-export")
    result = outcome(run)[0]
    assert (result["target"], result["activation_mode"]) == ("ampere", "a16")
    kl = {row["name"]: row["kl"] for row in result["baselines"]}
    other = {row["name"]: row["kl"] for row in finished[1]["baselines"]}
    assert kl["uniform fp8"] < other["uniform fp8"]


def test_two_machines_are_refused(search):
    done, _ = search("--target", "ampere", "--activation-mode", "w4a4", code=2)
    assert "--target ampere and --activation-mode w4a4 are two machines." in done.stderr
    assert search("--target", "blackwell", "--activation-mode", "w4a4", "--trials", -1, code=2)


@pytest.mark.slow
def test_a_space_of_experts_leaves_the_rest_alone(search):
    _, run = search("--space", "experts-only", "--trials", 2, "--no-export", budget=12)
    groups = yaml.safe_load((run / "assignment.yaml").read_text())["groups"]
    quantized = {name for name, choice in groups.items() if choice != "bf16"}
    assert quantized
    assert all(name.endswith("experts") for name in quantized)


def test_an_infeasible_budget_writes_nothing(search):
    result, run = search(code=3, budget=4.5)
    assert "below the floor of" in result.stderr
    assert "embeddings fixed at BF16 take" in result.stderr
    assert not run.exists()


def test_a_space_that_leaves_nothing_open_is_refused(search, tmp_path):
    space = tmp_path / "none.yaml"
    space.write_text("schema_version: 1\nname: none\nrules:\n  - {match: '*', formats: [bf16]}\n")
    result, run = search("--space", space, code=2, budget=16)
    assert "leaves no layer of" in result.stderr
    assert not run.exists()


@pytest.mark.slow
def test_a_run_directory_of_another_search_is_left_alone(search, finished):
    _, run = search("--no-export", "--trials", 0)
    before = outcome(run)
    result, _ = search("--no-export", "--trials", 0, "--seed", 7, code=5)
    assert "belongs to another search: seed is 0 there and 7 here" in result.stderr
    assert outcome(run) == before
    search("--no-export", "--trials", 0, "--seed", 7, "--fresh")
    aside = [path for path in run.parent.iterdir() if path.name.startswith("run.")]
    assert [outcome(path) for path in aside] == [before]


def test_a_model_that_was_trained_on_in_place_is_another_search(search, finished, model, tmp_path):
    """One tensor of the weights differs; the result that is there is not served for it."""
    shutil.copytree(finished[0], tmp_path / "run")
    trained = shutil.copytree(model, tmp_path / "model")
    tensor = open_source(trained).headers["model.layers.0.self_attn.q_proj.weight"]
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.begin)
        stream.write(bytes(2))
    result, _ = search("--trials", 8, model=trained, code=5)
    assert "belongs to another search: the content digest of the model is 'sha256:" in result.stderr
    same, _ = search("--trials", 8)
    assert "already holds this search's result" in same.stderr


def test_a_run_directory_under_a_file_is_refused(search, tmp_path):
    (tmp_path / "file").write_text("mine")
    result, _ = search("--no-export", out="file/run", code=2)
    assert "file/run" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_text_that_changed_since_is_a_conflict(autoquant, model, text, tmp_path):
    own = shutil.copytree(text, tmp_path / "text")
    arguments = (
        *("search", model, "--budget-bpe", BUDGET, "--calibration", own, *TOKEN_FLAGS),
        *("--trials", 0, "--no-mlflow", "--no-export", "--out", tmp_path / "run"),
    )
    assert autoquant(*arguments).exit_code == 0
    (tmp_path / "run" / "result.json").unlink()
    for file in own.iterdir():
        file.write_text("more and " + file.read_text())
    result = autoquant(*arguments)
    assert result.exit_code == 5
    assert "was begun on other tokens" in result.stderr


@pytest.mark.slow
def test_a_single_sequence_has_no_standard_error(search):
    result, run = search(
        *("--report-tokens", 32, "--search-tokens", 32, "--calibration-tokens", 32),
        *("--trials", 4, "--no-export"),
    )
    assert " +- - nats per token" in result.stdout
    assert "too few report documents to tell assignments apart: 1." in result.stderr
    assert outcome(run)[0]["winner"]["stage"] == "solver"
    assert outcome(run)[0]["resolution"] is None


@pytest.fixture(scope="module")
def one_document(folder):
    file = folder / "one.txt"
    file.write_text(" ".join(f"{number} is a number." for number in range(3000)))
    return file


def test_passages_stand_in_for_documents_that_are_few_and_it_is_said(
    autoquant, model, finished, one_document
):
    result = autoquant(
        *("score", model, "--calibration", one_document, *TOKEN_FLAGS, "--report-tokens", 2048),
        *("--assignment", finished[0] / "assignment.yaml", "--format", "json"),
    )
    assert result.exit_code == 0, result.stderr
    split, kl = json.loads(result.stdout)["split"], json.loads(result.stdout)["kl"]
    assert (split["unit"], split["units"]) == ("passage", 8)
    assert 0 < kl["stderr"] < kl["mean"]
    assert "the report tokens are from fewer than 8 documents (1)" in result.stderr
    assert "take their 8 passages as independent" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "warning"),
    [
        (2048, "take their 8 passages as independent"),
        (1024, "too few report passages to tell assignments apart: 4."),
    ],
)
def test_a_search_on_one_document_says_what_it_resamples(search, one_document, tokens, warning):
    result, run = search(
        *("--calibration", one_document, "--report-tokens", tokens, "--trials", 1, "--no-export")
    )
    assert warning in result.stderr
    assert result.stderr.count("passages") == 1 + (tokens == 2048)
    found, *_ = outcome(run)
    assert found["tokens"]["report"]["unit"] == "passage"
    has_interval = found["finalists"][1]["to_solver"]["low"] is not None
    assert has_interval is (tokens == 2048)


@pytest.mark.slow
def test_optuna_proposes_on_request_and_fills_the_budget(search):
    _, run = search("--trials", 6, "--sampler", "tpe", "--no-export")
    trials = trials_of(run)
    asked = [trial for trial in trials if trial["stage"] == "reweight"]
    assert 0 < len(asked) <= 6
    assert all(trial["fits"] and {"depth", "exponent"} < trial["params"].keys() for trial in asked)
    assert not {"runner-up", "refit", "swap"} & {trial["stage"] for trial in trials}
    result = json.loads((run / "result.json").read_text())
    assert "reweight" in {row["stage"] for row in result["stages"]}


@pytest.mark.slow
def test_no_trial_begins_after_the_time_is_up(search):
    _, run = search("--max-seconds", 0.001, "--no-export", "--trials", 50)
    stages = {trial["stage"] for trial in outcome(run)[1]}
    assert {"baseline", "solver"} <= stages <= {"baseline", "solver", "rules"}
