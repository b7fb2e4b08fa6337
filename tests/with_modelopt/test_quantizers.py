"""ModelOpt's quantizers for a search's assignment: what they export, compute and save is ours."""

import json
import shutil

import pytest
import torch
import transformers
from exported_models import exported_by_modelopt, load_tensors
from modelopt_kernels import running_kernels
from records import forget_checksums
from searchable import TOKEN_FLAGS, save_searchable, save_text
from tiny_models import save_model

import autoquant
from autoquant.errors import ConfigError
from autoquant.formats import BF16, FP8, NVFP4, Choice, ScaleRule
from autoquant.measure.calibration import Calibration
from autoquant.model.live import QuantizedModel
from autoquant.modelopt import apply
from autoquant.modelopt.quantizers import set_quantizers
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = torch.arange(3, 35, device=DEVICE).reshape(2, 16)

SPACE = """\
schema_version: 1
name: every kind of codes
rules:
  - {match: model.layers.0.self_attn.o_proj, formats: [fp8/gptq]}
  - {match: [qkv, experts, gate_up], formats: [nvfp4/hessian/gptq, bf16]}
  - {match: [o], formats: [nvfp4/mse, fp8]}
  - {match: [down], formats: [nvfp4/four_over_six, bf16]}
"""


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def searched(request, tmp_path_factory):
    """A model and the run directory of a search that wrote a checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "space.yaml").write_text(SPACE)
    flags = dict(zip(TOKEN_FLAGS[::2], TOKEN_FLAGS[1::2], strict=True))
    settings = {flag.lstrip("-").replace("-", "_"): value for flag, value in flags.items()}
    run = autoquant.search(
        save_searchable(request.param, folder / "model"),
        budget_bpe=11.5,
        space=str(folder / "space.yaml"),
        calibration=str(save_text(folder / "text")),
        kv_cache="fp8",
        trials=2,
        mlflow=False,
        out=folder / "run",
        **(settings | {"calibration_tokens": 1024}),
    )
    return folder / "model", run


def test_what_modelopt_exports_of_an_applied_run_is_the_runs_checkpoint(searched, tmp_path):
    """Every tensor bit for bit, but for plain FP8 codes and for the sign of zeros.

    ModelOpt rounds FP8 quotients twice. Compensated codes may be a negative zero, whose number
    has no sign that ModelOpt's packing would keep.
    """
    folder, run = searched
    assignment = Assignment.read(run.path / "assignment.yaml")
    assert {str(choice) for _, choice in assignment} > {"nvfp4/hessian/gptq"}
    theirs = exported_by_modelopt(apply(load(folder), run), tmp_path / "theirs")
    ours = load_tensors(run.path / "checkpoint")
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        if name == "model.layers.0.self_attn.o_proj.weight":
            assert torch.equal(tensor.float(), theirs[name].float())
        elif tensor.dtype == torch.float8_e4m3fn and name.endswith(".weight"):
            assert (tensor.float() != theirs[name].float()).float().mean() < 0.06
        elif tensor.dtype == torch.uint8:
            assert torch.equal(without_signs_of_zeros(tensor), without_signs_of_zeros(theirs[name]))
        else:
            assert torch.equal(tensor, theirs[name]), name


def without_signs_of_zeros(codes):
    low, high = codes & 15, codes >> 4
    return torch.where(low == 8, 0, low) | (torch.where(high == 8, 0, high) << 4)


@pytest.mark.parametrize("choice", [FP8, NVFP4], ids=str)
def test_models_compute_what_was_measured(choice, tmp_path):
    folder = save_model("llama", tmp_path / "m", initializer_range=0.2)
    source, groups = opened(folder)
    assignment = Assignment.of({g.name: choice if g.layer == 0 else BF16 for g in groups})
    calibration = calibrated(groups)
    ours = QuantizedModel(load(folder).to(DEVICE), groups, mode=ActivationMode.W4A4)
    ours.set_input_scales(calibration.scales())
    ours.apply(assignment)
    model = load(folder).to(DEVICE)
    model = set_quantizers(model, groups, assignment, calibration, book_of(source))
    with torch.no_grad(), running_kernels():
        theirs = model(TOKENS).logits
        assert torch.equal(theirs, ours.model(TOKENS).logits)
        ours.apply(Assignment.of({}))
        assert not torch.equal(theirs, ours.model(TOKENS).logits)


def test_training_goes_on_from_what_was_applied(tmp_path):
    """A few steps of quantization-aware training lower the loss and keep the block scales."""
    folder = save_model("llama", tmp_path / "m", initializer_range=0.1)
    source, groups = opened(folder)
    cycle = [Choice(NVFP4.format, ScaleRule.MSE), FP8, NVFP4]
    assignment = Assignment.of({g.name: cycle[n % 3] for n, g in enumerate(groups) if g.layer})
    model = load(folder).to(DEVICE)
    model = set_quantizers(model, groups, assignment, calibrated(groups), book_of(source))
    static = [m for m in model.modules() if getattr(m, "_is_nvfp4_static_quantizer", False)]
    before = [quantizer.amax.clone() for quantizer in static]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with running_kernels():
        for _ in range(6):
            loss = model(TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert static
    assert all(torch.equal(a, q.amax) for a, q in zip(before, static, strict=True))


def test_experts_multiply_with_the_weights_that_were_measured(tmp_path):
    """Their sum over the experts of a token rounds in another order, so outputs differ."""
    folder = save_model("qwen3_moe", tmp_path / "m", num_experts_per_tok=2)
    source, groups = opened(folder)
    assignment = Assignment.of({g.name: FP8 if g.role == "experts" else BF16 for g in groups})
    book = book_of(source)
    model = set_quantizers(load(folder), groups, assignment, calibrated(groups), book)
    experts, group = model.model.layers[1].mlp.experts, groups["model.layers.1.mlp.experts"]
    codes = {own.name.split("experts.")[1]: book.linear(group, own, FP8) for own in group.linears}
    for number in range(4):
        wide = experts.gate_up_proj_weight_quantizers[number](experts.gate_up_proj[number])
        parts = [codes[f"{number}.{name}_proj"].decode() for name in ("gate", "up")]
        assert torch.equal(wide, torch.cat(parts))
        down = experts.down_proj_weight_quantizers[number](experts.down_proj[number])
        assert torch.equal(down, codes[f"{number}.down_proj"].decode())
    assert model.model.layers[1].mlp.experts.down_proj_input_quantizer.is_enabled


def test_a_saved_model_comes_back_with_its_quantizers(tmp_path):
    import modelopt.torch.opt as mto

    folder = save_model("llama", tmp_path / "m")
    source, groups = opened(folder)
    cycle = [Choice(NVFP4.format, ScaleRule.MSE), FP8, NVFP4, Choice(NVFP4.format, "four_over_six")]
    assignment = Assignment.of({g.name: cycle[n % 4] for n, g in enumerate(groups)})
    model = set_quantizers(load(folder), groups, assignment, calibrated(groups), book_of(source))
    mto.save(model, tmp_path / "saved.pt")
    again = mto.restore(load(folder), tmp_path / "saved.pt")
    first = exported_by_modelopt(model, tmp_path / "first")
    second = exported_by_modelopt(again, tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(name.endswith("weight_scale_2") for name in first)


def test_a_run_without_a_winner_and_a_model_of_another_shape_are_refused(searched, tmp_path):
    folder, run = searched
    (tmp_path / "begun").mkdir()
    shutil.copy(run.path / "run.json", tmp_path / "begun")
    forget_checksums(tmp_path / "begun")
    identity = json.loads((tmp_path / "begun" / "run.json").read_text())
    (tmp_path / "begun" / "run.json").write_text(json.dumps(identity | {"status": "interrupted"}))
    with pytest.raises(ConfigError, match="is interrupted: there is no winner"):
        apply(load(folder), tmp_path / "begun")
    smaller = save_searchable("llama", tmp_path / "smaller", intermediate_size=48)
    with pytest.raises(autoquant.errors.SourceError, match=r"on disk|no module in memory"):
        apply(load(smaller), run)


def opened(folder):
    from autoquant.plan.grouping import find_groups
    from autoquant.source.source import open_source

    source = open_source(folder)
    return source, find_groups(source)


def book_of(source):
    from autoquant.codes.book import CodeBook
    from autoquant.codes.weights import FileWeights

    return CodeBook(FileWeights(source.headers), memory_bytes=0)


def calibrated(groups):
    names = dict.fromkeys(linear.input_scale_set for linear in groups.linears)
    amax = {name: 1.0 + number / 7 for number, name in enumerate(names)}
    return Calibration(input_amax=amax, unseen=(), tokens=1, expert_tokens={})
