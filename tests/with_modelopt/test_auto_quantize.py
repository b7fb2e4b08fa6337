"""ModelOpt's documented example with AutoQuant's search behind it."""

import pytest
import torch
import transformers
from exported_models import exported_by_modelopt
from searchable import save_searchable

from autoquant.errors import ConfigError, InfeasibleBudget, RunConflict
from autoquant.modelopt import auto_quantize
from autoquant.modelopt.searching import save_bf16

pytestmark = pytest.mark.slow


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_searchable("llama", tmp_path_factory.mktemp("auto") / "model")


def batches(count=8, *, padded=False):
    """Batches as a tokenizer with padding gives them, for `model(**batch)`."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(3, 259, (4, 33), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[:, 32:] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids}


DOCUMENTED = {
    "constraints": {"effective_bits": 8.0},
    "quantization_formats": ["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"],
    "forward_step": lambda model, batch: model(**batch),
    "loss_func": lambda output, batch: output.loss,
    "num_calib_steps": 4,
    "num_score_steps": 4,
    "disabled_layers": ["*lm_head*"],
}


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    """The model and the state of a search, and the folder that it is kept in."""
    kept = tmp_path_factory.mktemp("kept")
    model = load(folder)
    returned, state = auto_quantize(
        model, data_loader=batches(padded=True), checkpoint=kept, **DOCUMENTED
    )
    assert returned is model
    return model, state, kept


def weight_bits(model):
    return {
        name: tuple(module.weight_quantizer.num_bits)
        for name, module in model.named_modules()
        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
    }


def test_the_example_of_modelopts_documentation_runs_with_one_import_changed(found):
    model, state, _ = found
    bits = weight_bits(model)
    assert set(bits.values()) == {(2, 1), (4, 3)}
    assert "lm_head" not in bits
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    cost = {(2, 1): 4.5, (4, 3): 8.0}
    taken = sum(m.weight.numel() * cost.get(bits.get(n), 16.0) for n, m in linears.items())
    elements = sum(m.weight.numel() for m in linears.values())
    assert 7.0 < taken / elements <= 8.0
    assert state["best"]["is_satisfied"]
    assert 0 < state["autoquant"]["kl"]["mean"] < 1


def test_the_copy_that_is_searched_is_the_model_as_it_is_loaded_in_bf16(folder, tmp_path):
    tokens = torch.arange(3, 35).view(2, 16)
    narrow = load(folder).eval()
    wide = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, original in {"narrow": narrow, "wide": wide}.items():
            save_bf16(original, tmp_path / name)
            assert torch.equal(load(tmp_path / name)(tokens).logits, narrow(tokens).logits)
    assert {p.dtype for p in wide.parameters()} == {torch.float32} == {wide.config.dtype}


def test_modelopts_own_functions_take_the_state(found, folder):
    import modelopt.torch.quantization as mtq

    model, state, _ = found
    config = mtq.get_auto_quantize_config(state)
    again = mtq.quantize(load(folder), config, lambda m: m(torch.arange(3, 35).view(1, -1)))
    assert weight_bits(again) == weight_bits(model)
    cheaper = mtq.get_auto_quantize_config(state, {"effective_bits": 7.0})
    enabled = [e for e in cheaper["quant_cfg"] if "weight" in e["quantizer_name"] and e["enable"]]
    assert all("lm_head" not in entry["quantizer_name"] for entry in enabled)
    assert len(enabled) > len(weight_bits(model)) - 1


def test_tokens_are_those_of_the_loader_without_padding_and_reported_ones_are_fresh(found):
    _, state, _ = found
    tokens = state["autoquant"]["tokens"]
    assert {name: split["tokens"] for name, split in tokens.items()} == {
        "calibration": 4 * 4 * 32,
        "search": 4 * 4 * 32,
        "report": 4 * 4 * 32,
    }
    assert tokens["search"]["digest"] == tokens["calibration"]["digest"]
    assert tokens["search"]["digest"] != tokens["report"]["digest"]


def test_a_kept_search_gives_its_result_again_and_refuses_another_model(found, folder, tmp_path):
    model, state, kept = found
    again, same = auto_quantize(
        load(folder), data_loader=batches(padded=True), checkpoint=kept, **DOCUMENTED
    )
    assert same["autoquant"]["winner"] == state["autoquant"]["winner"]
    first, second = (exported_by_modelopt(m, tmp_path / n) for m, n in ((model, "a"), (again, "b")))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = save_searchable("llama", tmp_path / "other", seed=1)
    with pytest.raises(RunConflict, match="the search of another model"):
        auto_quantize(load(other), data_loader=batches(), checkpoint=kept, **DOCUMENTED)


def test_a_module_search_space_fixes_a_part_and_counts_it(folder):
    model, state = auto_quantize(
        load(folder),
        data_loader=batches(),
        **DOCUMENTED
        | {
            "module_search_spaces": [
                {
                    "module_name_patterns": ["*layers.0.self_attn*"],
                    "quantization_formats": ["FP8_DEFAULT_CFG"],
                    "allow_no_quant": False,
                }
            ]
        },
    )
    bits = weight_bits(model)
    assert {b for name, b in bits.items() if "layers.0.self_attn" in name} == {(4, 3)}
    assert sum("layers.0.self_attn" in name for name in bits) == 4
    assert "run" not in state["autoquant"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"constraints": {"effective_bits": 4.0}}, InfeasibleBudget, "cheapest formats take"),
        ({"constraints": {"effective_bits": "5"}}, ConfigError, "effective_bits is '5'"),
        ({"constraints": {"cost_model": "active_moe"}}, ConfigError, "more than effective_bits"),
        ({"quantization_formats": ["INT8_DEFAULT_CFG"]}, ConfigError, "no format like INT8"),
        ({"method": "hessian"}, ConfigError, "method is 'hessian'"),
        ({"forward_step": None}, ConfigError, "needs data_loader and forward_step"),
        ({"forward_step": lambda model, batch: None}, ConfigError, "does not call the model"),
        ({"disabled_layers": "*"}, ConfigError, "no linear is left"),
        (
            {
                "module_search_spaces": [
                    {"module_name_patterns": "*q_proj", "quantization_formats": ["FP8_DEFAULT_CFG"]}
                ]
            },
            ConfigError,
            "names only a part of",
        ),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(changes, error, words, folder):
    with pytest.raises(error, match=words):
        auto_quantize(load(folder), data_loader=batches(), **DOCUMENTED | changes)


def test_one_batch_leaves_nothing_to_confirm_on(folder):
    with pytest.raises(ConfigError, match="no sequence for the report tokens"):
        auto_quantize(load(folder), data_loader=batches(1), **DOCUMENTED)
