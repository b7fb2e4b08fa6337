"""Scores that ModelOpt's own auto_quantize saved, as the prior of a search."""

import json

import pytest
import torch
import transformers
from records import trials_of
from searchable import TOKEN_FLAGS, save_searchable, save_text

import autoquant

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    save_searchable("llama", folder / "model")
    save_text(folder / "text")
    score(folder / "model", folder / "state.pt")
    return folder


def score(model, file, **changes):
    """ModelOpt's KL scores of FP8 and a state saved, on a CPU that has no NVFP4 of ModelOpt."""
    import modelopt.torch.quantization as mtq

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    loaded.config.use_cache = False
    generator = torch.Generator().manual_seed(0)
    settings = {
        "constraints": {"effective_bits": 12.0},
        "quantization_formats": ["FP8_DEFAULT_CFG"],
        "data_loader": [torch.randint(3, 259, (4, 32), generator=generator) for _ in range(2)],
        "forward_step": lambda m, tokens: m(input_ids=tokens).logits,
        "disabled_layers": ["*lm_head*"],
        "num_calib_steps": 2,
        "num_score_steps": 2,
        "method": "kl_div",
        "checkpoint": str(file),
    }
    return mtq.auto_quantize(loaded, **settings | changes)


@pytest.fixture
def search(autoquant_command, folder, tmp_path):
    def call(state, *more, space="[fp8, bf16]", model="model"):
        (tmp_path / "space.yaml").write_text(
            "schema_version: 1\nname: from scores\n"
            f"rules: [{{match: [qkv, o, gate_up, down], formats: {space}}}]\n"
        )
        return autoquant_command(
            *("search", folder / model, "--space", tmp_path / "space.yaml", "--budget-bpe", 14),
            *("--calibration", folder / "text", *TOKEN_FLAGS, "--trials", 2, "--no-mlflow"),
            *("--no-export", "--out", tmp_path / "run", "--sensitivity", f"modelopt:{state}"),
            *more,
        )

    return call


def test_scores_of_modelopt_take_the_place_of_probes(folder, search, tmp_path):
    done = search(folder / "state.pt")
    assert done.exit_code == 0, done.stderr
    run = tmp_path / "run"
    stored = json.loads((run / "sensitivity.json").read_text())
    assert stored["method"] == "modelopt"
    assert not (run / "sensitivity.jsonl").exists()
    kl = {row["group"]: row["kl"] for row in stored["probes"]}
    state = torch.load(folder / "state.pt", weights_only=True)
    theirs = {
        stat["module_names"][0].replace("q_proj", "qkv").replace("gate_proj", "gate_up"): own
        for stat in state["candidate_stats"].values()
        for recipe, own in zip(stat["formats"], stat["scores"], strict=True)
        if str(recipe).startswith("FP8")
    }
    assert kl.keys() == theirs.keys()
    ratios = torch.tensor([kl[name] / theirs[name] for name in kl])
    assert torch.allclose(ratios, ratios[0].expand(len(ratios)), rtol=1e-9)
    trials = trials_of(run)
    all_fp8 = next(trial for trial in trials if trial["name"] == "uniform fp8")
    assert sum(kl.values()) == pytest.approx(all_fp8["kl"], rel=1e-6)
    page = autoquant.load_run(run).write_report().read_text()
    assert "as ModelOpt scored it" in page


def test_a_run_goes_on_with_its_own_scores_alone(folder, search, tmp_path):
    assert search(folder / "state.pt").exit_code == 0
    assert search(folder / "state.pt").exit_code == 0
    (tmp_path / "other.pt").write_bytes((folder / "state.pt").read_bytes() + b" ")
    other = search(tmp_path / "other.pt")
    assert other.exit_code == 5
    assert "probe" in other.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"no state", "is no whole state of ModelOpt's auto_quantize"),
        ({"candidate_stats": {"a": {"formats": []}}}, "is no whole state"),
        ({"best": {}}, "is no whole state"),
    ],
)
def test_a_broken_state_is_named(content, words, search, tmp_path):
    file = tmp_path / "state.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    done = search(file)
    assert done.exit_code == 4
    assert words in done.stderr
    assert "checkpoint" in done.stderr


def test_a_state_that_was_cut_off_is_named(folder, search, tmp_path):
    whole = (folder / "state.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    done = search(tmp_path / "cut.pt")
    assert done.exit_code == 4
    assert "is no whole state" in done.stderr


def test_a_state_of_another_model_is_refused(folder, search, tmp_path):
    for name, changes in {
        "wider": {"intermediate_size": 112},
        "deeper": {"num_hidden_layers": 3},
    }.items():
        save_searchable("llama", tmp_path / name, **changes)
        score(tmp_path / name, tmp_path / f"{name}.pt")
        done = search(tmp_path / f"{name}.pt", "--fresh")
        assert done.exit_code == 4, done.stderr
        assert "is the state of another model" in done.stderr


def test_a_format_without_scores_is_refused(folder, search):
    done = search(folder / "state.pt", space="[nvfp4/max, fp8, bf16]")
    assert done.exit_code == 2
    assert "has no score for model.layers.0.self_attn.qkv in nvfp4/max" in done.stderr
