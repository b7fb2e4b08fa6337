"""An FP8 cache of keys and values: rounded where engines round, measured, stored and read back."""

import json
from pathlib import Path
from typing import Any

import autoquant_kernels as kernels
import pytest
import torch
from searchable import TOKEN_FLAGS, save_searchable, save_text
from tiny_models import save_model

from autoquant.data.tokens import Split
from autoquant.errors import ConfigError, SourceError
from autoquant.export.export import export
from autoquant.export.layouts.base import Layout
from autoquant.export.read_back import open_quantized
from autoquant.export.verify import verify
from autoquant.formats import FP8, NVFP4
from autoquant.formats.kv_cache import KvCache
from autoquant.measure.scorer import Scorer
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.plan.kv_cache import KvRange, attention_modules, cache_bytes
from autoquant.source.source import Source, open_source

ATTENTION = ("model.layers.0.self_attn", "model.layers.1.self_attn")
RANGES = {name: KvRange(keys=3.0 + place, values=2.0) for place, name in enumerate(ATTENTION)}
NOTHING = Assignment.of({})
TOKENS = torch.arange(64).reshape(2, 32) * 7 % 48


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return open_source(save_searchable("llama", tmp_path_factory.mktemp("model") / "llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text")


@pytest.fixture
def model(source) -> QuantizedModel:
    loaded = load_model(source.path, torch.device("cpu")).model
    return QuantizedModel(
        loaded, find_groups(source), mode=ActivationMode.W4A4, attention=ATTENTION
    )


def logits(model: QuantizedModel, *, with_cache: bool) -> torch.Tensor:
    model.apply(NOTHING, with_cache=with_cache)
    with torch.inference_mode():
        return model.model(TOKENS, use_cache=False).logits


def export_with(source: Source, target: Path, layout: Layout = Layout.MODELOPT) -> Path:
    groups = find_groups(source)
    amax = {linear.input_scale_set: 4.0 for linear in groups.linears}
    choices = {"model.layers.0.self_attn.qkv": NVFP4, "model.layers.0.mlp.down_proj": FP8}
    assignment = Assignment.of(choices)
    export(source, groups, assignment, amax, target, layout=layout, kv_ranges=RANGES)
    return target


def test_a_cache_that_is_off_changes_nothing(model, source):
    plain = load_model(source.path, torch.device("cpu")).model
    with torch.inference_mode():
        expected = plain(TOKENS, use_cache=False).logits
    assert torch.equal(logits(model, with_cache=False), expected)


def test_keys_and_values_are_rounded_as_a_cache_of_transformers_would(model, source):
    """The same logits as with transformers' own cache, whose entries are rounded on entry."""
    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(self, key_states: Any, value_states: Any, layer_idx: int, *more: Any) -> Any:
            found = RANGES[ATTENTION[layer_idx]]
            keys = kernels.fake_quant_fp8(key_states, kernels.fp8_scale(found.keys))
            values = kernels.fake_quant_fp8(value_states, kernels.fp8_scale(found.values))
            return super().update(keys, values, layer_idx, *more)

    assert model.kv_cache is not None
    model.kv_cache.set_ranges(RANGES)
    plain = load_model(source.path, torch.device("cpu")).model
    with torch.inference_mode():
        expected = plain(TOKENS, past_key_values=Rounding(), use_cache=True).logits
    found = logits(model, with_cache=True)
    assert torch.equal(found, expected)
    assert not torch.equal(found, logits(model, with_cache=False))


def test_every_candidate_is_measured_with_the_cache_and_noise_without(model):
    assert model.kv_cache is not None
    scorer = Scorer(model, torch.device("cpu"))
    split = Split.unrelated("search", (TOKENS,), digest="cache")
    model.kv_cache.set_ranges(RANGES)
    exact = logits(model, with_cache=False).double().log_softmax(-1)
    rounded = logits(model, with_cache=True).double().log_softmax(-1)
    expected = (exact.exp() * (exact - rounded)).sum(-1).mean()
    assert scorer.score(NOTHING, split).mean == pytest.approx(expected.item(), rel=0.05)
    assert scorer.noise(split).mean < 0.1 * expected


def test_ranges_are_those_of_transformers_own_cache(model, source):
    from transformers import DynamicCache

    with model.observing():
        logits(model, with_cache=False)
    cache = DynamicCache()
    plain = load_model(source.path, torch.device("cpu")).model
    with torch.inference_mode():
        plain(TOKENS, past_key_values=cache, use_cache=True)
    assert model.kv_cache is not None
    assert model.kv_cache.observed_ranges() == {
        name: KvRange(keys=layer.keys.abs().max().item(), values=layer.values.abs().max().item())
        for name, layer in zip(ATTENTION, cache.layers, strict=True)
    }


def test_keys_that_overflow_are_named(model):
    model.model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("inf")
    with model.observing(), pytest.raises(SourceError, match=r"layers\.1\.self_attn hold NaN or"):
        logits(model, with_cache=False)


def test_attention_that_goes_another_way_is_an_error(source):
    loaded = load_model(source.path, torch.device("cpu")).model
    loaded.set_attn_implementation("eager")
    with pytest.raises(SourceError, match="computes its attention by 'eager'"):
        QuantizedModel(loaded, (), mode=ActivationMode.W4A4, attention=ATTENTION)


def test_module_without_keys_of_its_own_is_an_error(source):
    loaded = load_model(source.path, torch.device("cpu")).model
    model = QuantizedModel(loaded, (), mode=ActivationMode.W4A4, attention=ATTENTION[:1])
    with pytest.raises(SourceError, match="a LlamaAttention of the model caches keys"):
        logits(model, with_cache=False)


def test_model_without_keys_and_values_on_disk_is_refused(tmp_path):
    groups = find_groups(open_source(save_model("deepseek_v3", tmp_path)))
    with pytest.raises(ConfigError, match="needs attention with k_proj and v_proj"):
        attention_modules(groups)
    assert cache_bytes(KvCache.BF16, groups) == 0


def test_cache_without_a_quantized_layer_is_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="quantizes no layer"):
        export(source, find_groups(source), NOTHING, {}, tmp_path / "out", kv_ranges=RANGES)


@pytest.mark.parametrize("layout", Layout)
def test_scales_are_stored_declared_and_read_back(layout, source, tmp_path):
    folder = export_with(source, tmp_path / "out", layout)
    checkpoint = open_quantized(folder)
    assert checkpoint.kv_scales == {
        name: (kernels.fp8_scale(r.keys).item(), kernels.fp8_scale(r.values).item())
        for name, r in RANGES.items()
    }
    verification = verify(folder, source)
    assert verification.problems == ()
    assert (verification.layout, verification.kv_cache) == (layout, KvCache.FP8)
    keys = {
        Layout.MODELOPT: "model.layers.1.self_attn.k_proj.k_scale",
        Layout.COMPRESSED_TENSORS: "model.layers.1.self_attn.k_scale",
    }[layout]
    assert checkpoint.headers[keys].shape == (() if layout is Layout.MODELOPT else (1,))
    scheme = json.loads((folder / "config.json").read_text())["quantization_config"][
        "kv_cache_scheme"
    ]
    assert (scheme["num_bits"], scheme["type"], scheme["dynamic"]) == (8, "float", False)
    if layout is Layout.MODELOPT:
        nested = json.loads((folder / "hf_quant_config.json").read_text())
        assert nested["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert "keys and values in FP8" in (folder / "README.md").read_text()


@pytest.mark.parametrize("change", ["declaration", "scale", "missing", "all missing"])
def test_damage_to_the_cache_is_found(change, source, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = export_with(source, tmp_path / "out")
    name = "model.layers.0.self_attn.v_proj.v_scale"
    if change == "declaration":
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config["quantization_config"]["kv_cache_scheme"] = None
        file.write_text(json.dumps(config))
        found = "\n".join(verify(folder).problems)
        assert "disagree" in found
        assert "declared in BF16, and scales are stored for 2 attention modules" in found
        return
    tensors = load_file(folder / "model.safetensors")
    if change == "scale":
        tensors[name] = torch.zeros(())
    else:
        del tensors[name]
    if change == "all missing":
        del tensors["model.layers.0.self_attn.k_proj.k_scale"]
    save_file(tensors, folder / "model.safetensors")
    if change == "scale":
        assert f"{name} is 0.0; a scale is positive" in "\n".join(verify(folder).problems)
    elif change == "all missing":
        assert "layers.0.self_attn has no scales" in "\n".join(verify(folder).problems)
    else:
        with pytest.raises(SourceError, match=rf"and no {name}"):
            open_quantized(folder)


@pytest.mark.slow
def test_a_search_measures_and_exports_its_cache(autoquant, source, text, tmp_path):
    """The KL of the search, of its assignment and of its checkpoint in either layout are one."""
    flags = ("--calibration", text, *TOKEN_FLAGS, "--format", "json")
    with_cache = (*flags, "--kv-cache", "fp8")
    run = tmp_path / "run"
    searched = autoquant(
        *("search", source.path, "--budget-bpe", 9, *with_cache, "--trials", 1, "--no-mlflow"),
        *("--out", run),
    )
    assert searched.exit_code == 0, searched.stderr
    result = json.loads(searched.stdout)
    stored = verify(run / "checkpoint", source)
    assert (stored.problems, stored.kv_cache) == ((), KvCache.FP8)
    assert stored.checkpoint_bytes == result["checkpoint_bytes"]
    assert json.loads((run / "run.json").read_text())["signature"]["kv_cache"] == "fp8"
    exported = autoquant(
        *("export", source.path, "--assignment", run / "assignment.yaml", "--kv-cache", "fp8"),
        *("--calibrated", run / "calibration.json", "--layout", "compressed-tensors"),
        *("--out", tmp_path / "other"),
    )
    assert exported.exit_code == 0, exported.stderr
    kl = {}
    for name, what in {
        "assignment": ("--assignment", run / "assignment.yaml", "--kv-cache", "fp8"),
        "checkpoint": ("--checkpoint", run / "checkpoint"),
        "other layout": ("--checkpoint", tmp_path / "other"),
        "without": ("--assignment", run / "assignment.yaml"),
    }.items():
        scored = json.loads(autoquant("score", source.path, *what, *flags).stdout)
        kl[name] = scored["kl"]["mean"]
        assert scored["kv_cache"] == ("bf16" if name == "without" else "fp8")
        assert scored["bpe"] == result["bpe"]["checkpoint"] or name == "without"
    without = kl.pop("without")
    assert set(kl.values()) == {result["kl"]["mean"]}
    assert without != result["kl"]["mean"]


def test_ranges_of_a_search_without_a_cache_are_refused(autoquant, source, tmp_path):
    groups = find_groups(source)
    amax = {linear.input_scale_set: 1.0 for linear in groups.linears}
    (tmp_path / "calibration.json").write_text(
        json.dumps({"schema_version": 1, "input_amax": amax})
    )
    (tmp_path / "mix.yaml").write_text(
        "schema_version: 1\ngroups: {model.layers.0.self_attn.qkv: fp8}\n"
    )
    result = autoquant(
        *("export", source.path, "--assignment", tmp_path / "mix.yaml", "--kv-cache", "fp8"),
        *("--calibrated", tmp_path / "calibration.json", "--out", tmp_path / "out"),
    )
    assert result.exit_code == 4
    assert "no range for the keys and values of model.layers.0.self_attn" in result.stderr
    assert not (tmp_path / "out").exists()
