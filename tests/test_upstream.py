"""Names of PyTorch and transformers that neither documents, each doing what AutoQuant needs.

docs/upstream.md lists them. What the code uses and the page does not list fails here too.
"""

import ast
import gc
import re
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from tiny_models import save_model

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "autoquant", ROOT / "kernels" / "autoquant_kernels")
TOKENS = torch.arange(6)[None] + 3

EXPERT = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen3_moe", tmp_path_factory.mktemp("experts"), num_experts_per_tok=2)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen3", tmp_path_factory.mktemp("tied"))


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


CHECKS: dict[str, Callable[[Any, Any], None]] = {}


def checks(*names: str) -> Callable[[Any], Any]:
    """Register the test of these names; it is given the folders of two small models."""

    def register(check: Any) -> Any:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return register


@checks(
    "transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS",
    "_experts_implementation",
)
def experts_run_through_a_registered_function(experts, tied):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model, seen = load(experts), []

    def watched(module, hidden, index, weights):
        seen.append((module, hidden.shape, index.shape, weights.shape))
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden, index, weights)

    ALL_EXPERTS_FUNCTIONS["watched"] = watched
    try:
        assert hasattr(model.config, "_experts_implementation")
        model.set_experts_implementation("watched")
        assert model.config._experts_implementation == "watched"
        model(TOKENS)
    finally:
        del ALL_EXPERTS_FUNCTIONS["watched"]
    module, hidden, index, weights = seen[0]
    assert len(seen) == model.config.num_hidden_layers
    assert hidden == (TOKENS.numel(), model.config.hidden_size)
    assert index == weights == (TOKENS.numel(), model.config.num_experts_per_tok)
    assert module.num_experts == model.config.num_experts
    assert (module.has_gate, module.has_bias, module.is_transposed) == (True, False, False)


@checks("_apply_gate")
def an_expert_gates_the_first_half(experts, tied):
    module = load(experts).get_submodule(EXPERT)
    wide = torch.randn(3, 2 * module.down_proj.shape[-1])
    gate, up = wide.chunk(2, dim=-1)
    assert torch.equal(module._apply_gate(wide), module.act_fn(gate) * up)


@checks(
    "transformers.integrations.sdpa_attention.sdpa_attention_forward",
    "transformers.masking_utils.sdpa_mask",
    "_attn_implementation",
)
def attention_runs_through_a_registered_function(experts, tied):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    model, calls = load(tied), []

    def watched(module, query, key, value, *rest, **more):
        calls.append((key.shape, value.shape))
        return sdpa_attention_forward(module, query, key, value, *rest, **more)

    assert model.config.get_text_config()._attn_implementation == "sdpa"
    before = model(TOKENS).logits
    AttentionInterface.register("watched", watched)
    AttentionMaskInterface.register("watched", sdpa_mask)
    model.set_attn_implementation("watched")
    assert model.config.get_text_config()._attn_implementation == "watched"
    assert torch.equal(model(TOKENS).logits, before)
    heads = model.config.num_key_value_heads
    shape = (1, heads, TOKENS.shape[1], model.config.head_dim)
    assert calls == [(shape, shape)] * model.config.num_hidden_layers


@checks(
    "transformers.conversion_mapping.get_model_conversion_mapping",
    "transformers.core_model_loading.WeightConverter",
    "transformers.core_model_loading.WeightRenaming",
    "transformers.core_model_loading.rename_source_key",
    "_weight_conversions",
)
def rules_say_where_a_tensor_went(experts, tied):
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    model = load(experts)
    for rules in (model._weight_conversions, get_model_conversion_mapping(model)):
        assert all(isinstance(rule, WeightConverter | WeightRenaming) for rule in rules)
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        name, pattern = rename_source_key(
            f"{EXPERT}.1.up_proj.weight",
            [rule for rule in rules if isinstance(rule, WeightRenaming)],
            converters,
            model.base_model_prefix,
            model.state_dict(),
        )
        assert name == f"{EXPERT}.gate_up_proj"
        (own,) = [rule for rule in converters if pattern in rule.source_patterns]
        assert own.source_patterns.index(pattern) == 1


@checks(
    "transformers.core_model_loading.revert_weight_conversion",
)
def names_in_memory_become_names_on_disk(experts, tied):
    from safetensors import safe_open
    from transformers.core_model_loading import revert_weight_conversion

    model = load(experts)
    saved = revert_weight_conversion(model, model.state_dict())
    with safe_open(experts / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], stored[name]) for name in stored)


@checks(
    "transformers.core_model_loading.convert_and_load_state_dict_in_model",
    "transformers.modeling_utils.LoadStateDictConfig",
    "_get_dtype_plan",
)
def a_part_of_a_checkpoint_is_put_together_as_the_whole_is(experts, tied):
    from safetensors.torch import load_file
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    whole = load(experts)
    with torch.device("meta"):
        shape = type(whole)(whole.config)
    rules = LoadStateDictConfig(
        dtype=torch.bfloat16,
        dtype_plan=shape._get_dtype_plan(torch.bfloat16),
        weight_mapping=get_model_conversion_mapping(shape),
    )
    stored = load_file(experts / "model.safetensors")
    part = {name: tensor for name, tensor in stored.items() if ".layers.0." in name}
    convert_and_load_state_dict_in_model(shape, part, rules)
    block, expected = shape.model.layers[0].state_dict(), whole.model.layers[0].state_dict()
    assert all(torch.equal(block[name], expected[name]) for name in expected)
    assert all(tensor.is_meta for tensor in shape.model.layers[1].state_dict().values())


@checks("_parameters", "_buffers")
def a_module_has_the_tensors_that_it_is_given(experts, tied):
    norm = torch.nn.BatchNorm1d(2)
    weight, mean = torch.nn.Parameter(torch.tensor([2.0, 3.0])), torch.tensor([4.0, 5.0])
    norm._parameters["weight"], norm._buffers["running_mean"] = weight, mean
    assert norm.weight is weight
    assert norm.running_mean is mean


@checks("all_tied_weights_keys")
def a_tied_head_is_named(experts, tied):
    assert "lm_head.weight" in load(tied).all_tied_weights_keys
    assert "lm_head.weight" not in load(experts).all_tied_weights_keys


@checks(
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING",
    "transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
)
def mappings_know_the_classes_of_models(experts, tied):
    from transformers import LlamaConfig, Qwen3VLMoeConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    assert LlamaConfig in MODEL_FOR_CAUSAL_LM_MAPPING
    assert LlamaConfig not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    assert Qwen3VLMoeConfig not in MODEL_FOR_CAUSAL_LM_MAPPING
    assert Qwen3VLMoeConfig in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


@checks("transformers.utils.chat_template_utils")
def a_template_is_rendered_on_a_given_date(experts, tied):
    from transformers.utils import chat_template_utils

    from autoquant.data.template_process import _NewYear

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", _NewYear)
        (text,), _ = chat_template_utils.render_jinja_template(
            conversations=[[{"role": "user", "content": "hi"}]],
            chat_template="{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}",
        )
    assert text == "2026-01-01 hi"


@checks("torch._grouped_mm")
def groups_of_rows_have_a_weight_each(experts, tied):
    rows = torch.randn(24, 16).bfloat16()
    weights = torch.randn(2, 16, 32).bfloat16()
    ends = torch.tensor([8, 24], dtype=torch.int32)
    together = torch._grouped_mm(rows, weights, offs=ends)
    apart = torch.cat([rows[:8] @ weights[0], rows[8:] @ weights[1]])
    torch.testing.assert_close(together, apart)


@checks("torch._C._construct_storage_from_data_pointer")
def a_storage_is_made_of_memory_that_another_one_owns(experts, tied):
    owner = torch.arange(8, dtype=torch.uint8)
    storage = torch._C._construct_storage_from_data_pointer(
        owner.data_ptr() + 2, torch.device("cpu"), 4
    )
    part = torch.empty(0, dtype=torch.uint8).set_(storage)
    owner[3] = 100
    assert part.tolist() == [2, 100, 4, 5]


@checks("_version")
def a_tensor_counts_its_changes(experts, tied):
    weight = torch.zeros(4)
    before = weight._version
    weight.add_(1)
    assert weight._version == before + 1


@checks("torch.utils.weak.WeakTensorKeyDictionary")
def a_copy_lives_as_long_as_its_tensor(experts, tied):
    from torch.utils.weak import WeakTensorKeyDictionary

    kept = WeakTensorKeyDictionary()
    first, equal = torch.zeros(2), torch.zeros(2)
    kept[first], kept[equal] = "first", "second"
    assert (kept[first], kept[equal]) == ("first", "second")
    del equal
    gc.collect()
    assert list(kept.values()) == ["first"]


@checks("torch.cpu.get_capabilities")
def the_processor_says_what_it_can(experts, tied):
    capabilities = torch.cpu.get_capabilities()
    assert {"architecture", "avx2"} <= capabilities.keys() or "bf16" in capabilities
    assert {type(v) for k, v in capabilities.items() if k.startswith(("avx", "amx"))} <= {bool}


@checks("_get_default_store")
def the_group_of_this_process_has_a_store_that_counts(experts, tied):
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        store = distributed.distributed_c10d._get_default_store()
        assert [store.add("told", 1) for _ in range(2)] == [1, 2]
    finally:
        distributed.destroy_process_group()


def listed() -> list[str]:
    page = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)


@pytest.mark.parametrize("name", listed())
def test_a_name_of_the_page_does_what_autoquant_needs(name, experts, tied):
    CHECKS[name](experts, tied)


def test_every_check_is_of_a_name_on_the_page():
    assert CHECKS.keys() == set(listed())


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_both_libraries_are_bounded_above_the_release_that_the_tests_run_with(package):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = [each for each in map(Requirement, project["dependencies"]) if each.name == package]
    assert version(package) in wanted.specifier
    assert any(bound.operator == "<" for bound in wanted.specifier)


DOCUMENTED = {"_exit", "transformers.utils.logging", "__notes__"}
"""By transformers, and by Python."""


def test_the_code_uses_no_other_such_name():
    trees = [
        ast.parse(path.read_text(encoding="utf-8"))
        for package in PACKAGES
        for path in sorted(package.rglob("*.py"))
    ]
    own = {name for tree in trees for name in own_names(tree)}
    used = {name for tree in trees for name in foreign_names(tree)}
    assert used - own - DOCUMENTED - set(listed()) == set()
    assert len(used & set(listed())) >= 15


def own_names(tree: ast.Module) -> Iterator[str]:
    """Private names that the packages define themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def foreign_names(tree: ast.Module) -> Iterator[str]:
    """Imports from inside of transformers, and private attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            whole = ast.unparse(node)
            yield whole if whole.startswith("torch.") else node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr"}:
            name = node.args[1]
            if isinstance(name, ast.Constant) and str(name.value).startswith("_"):
                yield name.value
