"""The compressed-tensors layout: the same numbers as in the other, and readers that load it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import (
    NVFP4_46,
    NVFP4_MAX,
    NVFP4_MSE,
    change_tensors,
    input_amax,
    load_tensors,
    mixed,
    uniform,
)
from hypothesis import example, given
from hypothesis import strategies as st
from searchable import TOKEN_FLAGS, save_searchable, save_text
from tiny_models import MODELS, save_model

from autoquant.errors import SourceError
from autoquant.export.declaration import declare, quantized_linears
from autoquant.export.export import export
from autoquant.export.layouts.base import Layout
from autoquant.export.layouts.compressed_tensors import quantization_config, scale_of
from autoquant.export.layouts.engine_view import compressed_tensors_view
from autoquant.export.read_back import open_quantized
from autoquant.export.verify import verify
from autoquant.formats import BF16, FP8, Choice, Format, ScaleRule
from autoquant.formats.kv_cache import KvCache
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import Source, open_source

CT = Layout.COMPRESSED_TENSORS
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.0.self_attn.o_proj"  # noqa: E741


def bf16_amax(source: Source) -> dict[str, float]:
    """Input magnitudes as a BF16 model has them."""
    amax = input_amax(find_groups(source))
    return {name: torch.tensor(value).bfloat16().item() for name, value in amax.items()}


def export_as(source: Source, assignment: Assignment, target: Path, layout: Layout = CT) -> Path:
    groups = find_groups(source)
    export(source, groups, assignment, bf16_amax(source), target, layout=layout)
    return target


def config_of(source: Source, assignment: Assignment) -> dict[str, Any]:
    groups = find_groups(source)
    return quantization_config(source.headers, groups, quantized_linears(groups, assignment))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Source:
    return open_source(save_model("llama", tmp_path_factory.mktemp("llama") / "source"))


@pytest.fixture(scope="module")
def assignment(dense) -> Assignment:
    """Every format in the attention of the first layer and the MLP of the second."""
    choices = {"self_attn.qkv": NVFP4_MAX, "self_attn.o_proj": FP8, "mlp.gate_up": NVFP4_46}
    return Assignment.of({f"model.layers.0.{name}": choice for name, choice in choices.items()})


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_both_layouts_hold_the_same_model(kind, tmp_path):
    source = open_source(save_model(kind, tmp_path / "source", shard_size="80KB"))
    one, other = (
        export_as(source, mixed(find_groups(source)), tmp_path / layout, layout)
        for layout in Layout
    )
    assert verify(other, source).problems == ()
    assert verify(other).checkpoint_bytes == verify(one).checkpoint_bytes
    ours, theirs = open_quantized(one), open_quantized(other)
    assert theirs.layout is CT
    assert ours.input_scales == theirs.input_scales
    assert ours.choices == theirs.choices
    pairs = zip(ours.tensors(), theirs.tensors(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_codes_and_block_scales_are_the_same_bytes_and_scalars_are_inverted(
    dense, assignment, tmp_path
):
    ours = load_tensors(export_as(dense, assignment, tmp_path / "one", Layout.MODELOPT))
    theirs = load_tensors(export_as(dense, assignment, tmp_path / "two"))
    assert torch.equal(ours[f"{Q}.weight"], theirs[f"{Q}.weight_packed"])
    for name in (f"{Q}.weight_scale", f"{O}.weight"):
        assert torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8))
    for name in (f"{O}.weight_scale", f"{O}.input_scale"):
        assert torch.equal(ours[name][None], theirs[name])
    for scale, reciprocal in (
        ("weight_scale_2", "weight_global_scale"),
        ("input_scale", "input_global_scale"),
    ):
        assert torch.equal(1 / ours[f"{Q}.{scale}"][None], theirs[f"{Q}.{reciprocal}"])
    renamed = {f"{Q}.weight", f"{Q}.weight_scale_2", f"{Q}.input_scale"}
    assert renamed.isdisjoint(theirs)
    assert not (tmp_path / "two" / "hf_quant_config.json").exists()
    assert json.loads((tmp_path / "two" / "autoquant.json").read_text())["layout"] == CT


@given(st.integers(1, 0x7F7F), st.sampled_from([ScaleRule.MAX, ScaleRule.FOUR_OVER_SIX]))
@example(1, ScaleRule.MAX)
def test_scale_is_recovered_from_its_reciprocal(bits, rule):
    """Of every BF16 magnitude whose scale has a reciprocal."""
    import autoquant_kernels as kernels

    amax = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).item()
    scale = kernels.nvfp4_global_scale(amax, rule)
    if 0 < 1 / scale < float("inf") and scale >= torch.finfo(torch.float32).tiny:
        assert torch.equal(scale_of((1 / scale).reshape(1)), scale)


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_reciprocals_of_other_tools_are_inverted(value):
    found = scale_of(torch.tensor([value]))
    assert abs(found.double().item() * value - 1) < 2.0**-22


def test_mixed_file_names_every_matrix_once_and_fp8_first(dense, assignment):
    config = config_of(dense, assignment)
    assert (config["quant_method"], config["format"]) == (CT, "mixed-precision")
    assert config["quantization_status"] == "compressed"
    fp8, nvfp4 = config["config_groups"].values()
    assert fp8["targets"] == [O]
    assert sorted(nvfp4["targets"]) == sorted(
        [
            *(f"model.layers.0.self_attn.{part}_proj" for part in ("q", "k", "v", "qkv")),
            *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "gate_up")),
        ]
    )
    assert (fp8["format"], nvfp4["format"]) == ("float-quantized", "nvfp4-pack-quantized")
    named = {name for own in find_groups(dense).linears for name in (own.name, *own.engine_names)}
    left = named - {*fp8["targets"], *nvfp4["targets"]}
    assert {*left, "lm_head", "model.embed_tokens"} == set(config["ignore"])


@pytest.mark.parametrize(
    ("choice", "format"), [(NVFP4_MAX, "nvfp4-pack-quantized"), (FP8, "float-quantized")]
)
def test_one_format_beside_bf16_is_a_uniform_checkpoint(dense, choice, format):
    everywhere = uniform(find_groups(dense), choice)
    config = config_of(dense, everywhere.replace({"model.layers.0.self_attn.qkv": BF16}))
    (group,) = config["config_groups"].values()
    assert (config["format"], group["format"]) == (format, format)
    assert set(group["targets"]).isdisjoint(config["ignore"])
    assert not any(name == "Linear" or name.startswith("re:") for name in group["targets"])
    assert {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"} < set(config["ignore"])
    view = compressed_tensors_view(config)
    assert view.form("lm_head") == BF16.form
    with_head = config_of(dense, everywhere.replace({"lm_head": choice}))
    assert compressed_tensors_view(with_head).form("lm_head") == choice.form


def test_head_of_a_model_in_another_is_targeted_by_its_own_name(tmp_path):
    source = open_source(save_model("minimax_m3_vl", tmp_path))
    head = "language_model.lm_head"
    config = config_of(source, uniform(find_groups(source), FP8).replace({head: FP8}))
    targets = config["config_groups"]["group_0"]["targets"]
    assert head in targets
    assert not any("vision" in name for name in targets)
    assert not {"lm_head", head} & set(config["ignore"])
    assert compressed_tensors_view(config).form(head) == FP8.form
    without = config_of(source, uniform(find_groups(source), FP8))
    assert compressed_tensors_view(without).form(head) == BF16.form


def test_nothing_quantized_declares_nothing(dense):
    groups = find_groups(dense)
    for layout in Layout:
        assert declare(layout, dense.headers, groups, {}, KvCache.BF16) is None


def test_experts_are_targeted_under_the_names_of_every_engine(tmp_path):
    source = open_source(save_model("minimax_m2", tmp_path))
    groups = find_groups(source)
    experts = {group.name: FP8 for group in groups if group.role == "experts"}
    chosen = Assignment.of(experts | {"model.layers.0.self_attn.o_proj": NVFP4_MAX})
    fp8, _ = config_of(source, chosen)["config_groups"].values()
    for block in ("block_sparse_moe", "mlp"):
        assert f"model.layers.1.{block}.experts.3.w2" in fp8["targets"]
    view = compressed_tensors_view(config_of(source, chosen))
    for name in ("mlp.experts.0.gate_proj", "block_sparse_moe.experts.12.w1"):
        assert view.form(f"model.layers.1.{name}") == FP8.form
        assert view.form(f"layers.1.{name}") == FP8.form
    for other in ("model.layers.11.mlp.experts.0.up_proj", "model.layers.1.mlp.gate"):
        assert view.form(other) == BF16.form


def test_experts_of_gemma_4_are_named_as_sglang_holds_them(tmp_path):
    """Under `moe`, where the checkpoint has them in the layer itself."""
    source = open_source(save_model("gemma4_moe", tmp_path))
    ignored = config_of(source, uniform(find_groups(source), FP8))["ignore"]
    asked = {f"model.layers.{index}.moe.experts.0.gate_proj" for index in range(2)}
    assert asked < set(ignored)


def test_experts_without_a_gate_are_targeted_under_a_name_that_engines_make_up(tmp_path):
    source = open_source(save_model("nemotron_h", tmp_path))
    chosen = Assignment.of({"backbone.layers.1.mixer.experts": NVFP4_MAX})
    config = config_of(source, chosen.replace({"backbone.layers.0.mixer.in_proj": FP8}))
    _, nvfp4 = config["config_groups"].values()
    [expression] = [t.removeprefix("re:") for t in nvfp4["targets"] if t.startswith("re:")]
    for name in (
        "model.layers.1.mixer.experts.0.None",
        "backbone.layers.1.mixer.experts.3.gate_proj",
    ):
        assert re.match(expression, name)
    for name in ("model.layers.11.mixer.experts.0.up_proj", "model.layers.1.mixer.gate"):
        assert not re.match(expression, name)


def test_exact_names_only(tmp_path):
    source = open_source(save_model("qwen3_moe", tmp_path))
    config = config_of(source, mixed(find_groups(source)))
    names = [name for group in config["config_groups"].values() for name in group["targets"]]
    assert not any("*" in name or name.startswith("re:") for name in names + config["ignore"])
    assert "model.layers.0.mlp.gate" in config["ignore"]


@pytest.mark.parametrize("name", [f"{Q}.weight_global_scale", f"{Q}.input_global_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_reciprocal_that_is_not_positive_and_finite(dense, assignment, tmp_path, name, value):
    folder = export_as(dense, assignment, tmp_path / "out")
    change_tensors(folder, lambda tensors: tensors[name].fill_(value))
    assert f"{name} is {value}; a scale is positive" in "\n".join(verify(folder).problems)


def test_damage_is_found(dense, assignment, tmp_path):
    folder = export_as(dense, assignment, tmp_path / "out")
    change_tensors(folder, lambda tensors: tensors[f"{Q}.weight_global_scale"].mul_(2))
    found = "\n".join(verify(folder, dense).problems)
    assert f"{Q}.weight_global_scale" in found
    assert "they share" in found
    assert f"{Q}: " in found


def test_declaration_that_differs_from_what_is_stored(dense, assignment, tmp_path):
    folder = export_as(dense, assignment, tmp_path / "out")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["ignore"].append(Q)
    file.write_text(json.dumps(config))
    taken, listed = verify(folder).problems
    assert taken == f"{Q} is stored in nvfp4, and engines take it for bf16."
    assert listed.startswith(f"config.json has {Q} in quantization_config.ignore")
    (folder / "hf_quant_config.json").write_text("{}")
    assert "is not read beside compressed-tensors" in verify(folder).problems[0]


@pytest.mark.parametrize("end", ["weight_scale", "weight_global_scale", "input_global_scale"])
def test_missing_scale_is_an_error_at_once(dense, assignment, tmp_path, end):
    folder = export_as(dense, assignment, tmp_path / "out")
    change_tensors(folder, lambda tensors: tensors.pop(f"{Q}.{end}"))
    with pytest.raises(SourceError, match=rf"without ({Q})?\.{end}"):
        open_quantized(folder)


@pytest.mark.parametrize(
    ("choice", "is_said"), [(NVFP4_MAX, True), (FP8, False)], ids=["nvfp4", "fp8"]
)
@pytest.mark.parametrize("role", ["mlp.experts", "self_attn.qkv"])
def test_card_says_what_transformers_cannot_load(choice, is_said, role, tmp_path):
    source = open_source(save_model("qwen3_moe", tmp_path / "source"))
    chosen = Assignment.of({f"model.layers.0.{role}": choice})
    text = (export_as(source, chosen, tmp_path / "out") / "README.md").read_text()
    said = "drops the global scale of NVFP4 experts" if role == "mlp.experts" else "fails to load"
    assert ("Not with transformers" in text) is (said in text) is is_said
    assert ("autoquant score ORIGINAL --checkpoint PATH" in text) is is_said
    assert ("transformers 5.16 or newer loads it too" in text) is not is_said
    assert "TensorRT" not in text
    other = export_as(source, chosen, tmp_path / "other", Layout.MODELOPT)
    assert "transformers" not in (other / "README.md").read_text()


class TransformersInput:
    """Rounds the input of a linear as compressed-tensors does it: quotients in BF16."""

    def __init__(self, format: Format, scalar: torch.Tensor) -> None:
        self.format, self.scalar = format, scalar

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (x,) = inputs
        if self.format is FP8.format:
            scale = self.scalar.bfloat16()
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale
        blocks = x.unflatten(-1, (-1, 16))
        wanted = blocks.abs().amax(-1, keepdim=True) / torch.tensor(6.0, dtype=x.dtype)
        scale = (self.scalar * wanted).clamp(max=448).to(torch.float8_e4m3fn).float()
        step = torch.where(scale == 0, 0.125, scale) / self.scalar
        middle = (E2M1[1:] + E2M1[:-1]) / 2
        size = (blocks / step).abs()
        up = torch.bucketize(size, middle, right=True)
        down = torch.bucketize(size, middle)
        code = torch.where(up % 2 == 0, up, down)
        return (E2M1[code] * torch.sign(blocks) * step).flatten(-2).to(x.dtype)


def loaded_by_transformers(folder: Path, source: Source) -> tuple[Any, Any]:
    """The checkpoint as transformers loads it, and the source's model with decoded weights.

    transformers keeps FP8 scales in BF16, and divides by the reciprocals of NVFP4.
    """
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.bfloat16)
    stored = load_tensors(folder)
    for name, choice in open_quantized(folder).choices.items():
        module, scale = ours.get_submodule(name), stored[f"{name}.weight_scale"]
        if choice == FP8:
            module.weight.data = stored[f"{name}.weight"].bfloat16() * scale.bfloat16()
            scalar = stored[f"{name}.input_scale"]
        else:
            packed = stored[f"{name}.weight_packed"]
            codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
            values = E2M1[codes & 7] * (1 - 2 * (codes >> 3))
            step = scale.float() / stored[f"{name}.weight_global_scale"]
            module.weight.data = (values.unflatten(-1, (-1, 16)) * step[..., None]).flatten(-2)
            module.weight.data = module.weight.data.bfloat16()
            scalar = stored[f"{name}.input_global_scale"]
        module.register_forward_pre_hook(TransformersInput(choice.format, scalar))
    return theirs, ours


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(96).reshape(3, 32) * 31 % 48
    with torch.inference_mode():
        return model(tokens).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_transformers_computes_with_exactly_these_numbers(kind, tmp_path):
    source = open_source(save_model(kind, tmp_path / "source", initializer_range=0.12))
    folder = export_as(source, mixed(find_groups(source)), tmp_path / "out")
    theirs, ours = loaded_by_transformers(folder, source)
    assert (logits(theirs) - logits(ours)).abs().max().item() == 0.0


@pytest.mark.parametrize("choice", [NVFP4_MAX, NVFP4_MSE], ids=str)
def test_weights_alone_are_what_was_scored_in_transformers(choice: Choice, tmp_path):
    """Without its rounding of inputs, transformers is the fake-quantized model to the last bit."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    source = open_source(save_searchable("llama", tmp_path / "source"))
    groups = find_groups(source)
    chosen = uniform(groups, choice).replace({"model.layers.1.mlp.gate_up": BF16})
    folder = export_as(source, chosen, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for module in theirs.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_scheme.input_activations = None
    model = load_model(source.path, torch.device("cpu")).model
    QuantizedModel(model, groups, mode=ActivationMode.W4A16).apply(chosen)
    assert (logits(theirs) - logits(model)).abs().max().item() == 0.0


@pytest.mark.slow
def test_nvfp4_experts_are_run_by_score_and_said_to_be(autoquant, tmp_path):
    """Experts that transformers loads wrong have exactly the KL of their assignment here."""
    source = save_searchable("qwen3_moe", tmp_path / "source")
    text = save_text(tmp_path / "text")
    choices = {"mlp.experts": NVFP4_46, "self_attn.qkv": FP8, "self_attn.o_proj": NVFP4_MSE}
    mix = Assignment.of({f"model.layers.1.{name}": choice for name, choice in choices.items()})
    (tmp_path / "mix.json").write_text(json.dumps(mix.to_dict()))
    flags = ("--calibration", text, *TOKEN_FLAGS, "--format", "json")
    what = ("--assignment", tmp_path / "mix.json")
    exported = autoquant(
        *("export", source, *what, *flags, "--layout", CT, "--out", tmp_path / "out")
    )
    assert exported.exit_code == 0, exported.stderr
    assert "drops the global scale of NVFP4 experts" in exported.stderr
    assert "autoquant score MODEL --checkpoint DIR" in exported.stderr
    of_mix = json.loads(autoquant("score", source, *what, *flags).stdout)
    of_out = json.loads(autoquant("score", source, "--checkpoint", tmp_path / "out", *flags).stdout)
    assert of_out["kl"] == of_mix["kl"]
    assert of_out["kl"]["mean"] > 0


def test_experts_that_stay_are_left_out_under_the_names_that_sglang_asks(tmp_path):
    """Of the first expert, whatever the checkpoint calls its parts."""
    source = open_source(save_model("minimax_m2", tmp_path))
    everywhere = uniform(find_groups(source), FP8)
    kept = "model.layers.0.block_sparse_moe.experts"
    ignored = config_of(source, everywhere.replace({kept: BF16}))["ignore"]
    for container in (kept, kept.removeprefix("model.")):
        asked = {f"{container}.0.{part}_proj" for part in ("gate", "up", "down")}
        assert asked < set(ignored)
    assert not any("layers.1" in name and ".experts.0." in name for name in ignored)


def test_experts_in_one_tensor_are_left_out_under_the_names_that_sglang_asks(tmp_path):
    source = open_source(save_model("gpt_oss", tmp_path))
    ignored = config_of(source, uniform(find_groups(source), FP8))["ignore"]
    for layer in range(2):
        first = f"model.layers.{layer}.mlp.experts.0"
        assert {f"{first}.{part}_proj" for part in ("gate", "up", "down")} < set(ignored)
