"""The experts' forward against transformers' own, and quantization inside it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchable import WITH_EXPERTS, save_searchable

from autoquant.errors import SourceError
from autoquant.formats import FP8, NVFP4
from autoquant.model import experts
from autoquant.model.inputs import InputScale
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=WITH_EXPERTS)
def folder(request, tmp_path_factory):
    return save_searchable(request.param, tmp_path_factory.mktemp(request.param) / "source")


@pytest.fixture
def model(folder):
    return load_model(folder, CPU).model


def block_of(model):
    return next(
        m for m in model.modules() if getattr(m, "num_experts", 0) and hasattr(m, "has_gate")
    )


def routed(block, tokens: int = 64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, block.gate_up_proj.shape[-1], generator=generator)
    index = torch.stack(
        [torch.randperm(block.num_experts, generator=generator)[:2] for _ in range(tokens)]
    )
    weights = torch.rand(tokens, 2, generator=generator)
    return hidden, index, weights / weights.sum(dim=-1, keepdim=True)


def eager(block, hidden, index, weights):
    block.config._experts_implementation = "eager"
    try:
        return block(hidden, index, weights)
    finally:
        block.config._experts_implementation = experts.IMPLEMENTATION


@torch.inference_mode()
def test_experts_are_as_close_to_float32_as_transformers_own(model):
    block = block_of(model)
    hidden, index, weights = routed(block)
    exact = eager(copy.deepcopy(block).float(), hidden.bfloat16().float(), index, weights)
    theirs = eager(block, hidden.bfloat16(), index, weights.bfloat16())
    ours = block(hidden.bfloat16(), index, weights.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@torch.inference_mode()
def test_experts_in_float32_are_transformers_own(model):
    block = copy.deepcopy(block_of(model)).float()
    hidden, index, weights = routed(block)
    torch.testing.assert_close(
        block(hidden, index, weights), eager(block, hidden, index, weights), rtol=1e-5, atol=1e-6
    )


@torch.inference_mode()
def test_experts_without_a_token_change_nothing(model):
    block = block_of(model)
    hidden, _, weights = routed(block)
    index = torch.tensor([[0, 2]]).expand(len(hidden), 2)
    before = block(hidden.bfloat16(), index, weights)
    block.gate_up_proj[1] = 7.0
    assert torch.equal(block(hidden.bfloat16(), index, weights), before)


@torch.inference_mode()
@pytest.mark.parametrize("choice", [NVFP4, FP8], ids=str)
def test_a_quantized_layer_of_experts_changes_the_output_and_no_other_layer(folder, model, choice):
    groups = [g for g in find_groups(open_source(folder)) if g.role == "experts"]
    quantized = QuantizedModel(model, groups, mode=ActivationMode.W4A4)
    names = {linear.input_scale_set for group in groups for linear in group.linears}
    quantized.set_input_scales(dict.fromkeys(names, InputScale(amax=4.0)))
    tokens = torch.arange(3, 35)[None]

    def hidden_states():
        return model(input_ids=tokens, output_hidden_states=True).hidden_states

    before = hidden_states()
    quantized.apply(Assignment.of({groups[1].name: choice}))
    after = hidden_states()
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[2], before[2])


def test_experts_of_another_layout_are_named():
    class Transposed:
        has_gate = True
        is_transposed = True

    class Own:
        pass

    with pytest.raises(
        SourceError, match=r"mlp\.experts \(Transposed\) keeps its experts transposed"
    ):
        experts.check_supported("mlp.experts", Transposed())
    with pytest.raises(SourceError, match=r"mlp\.experts \(Own\) has a forward of its own"):
        experts.check_supported("mlp.experts", Own())


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(0, 150), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_each_row_is_multiplied_with_its_own_expert(counts, dtype):
    # Small integers: every sum is exact, in whatever order a kernel adds.
    generator = torch.Generator().manual_seed(sum(counts))
    rows = torch.randint(-2, 3, (sum(counts), 16), generator=generator).to(dtype)
    weight = torch.randint(-2, 3, (len(counts), 8, 16), generator=generator).to(dtype)
    one_by_one = [part @ w.t() for part, w in zip(rows.split(counts), weight, strict=True)]
    together = experts.grouped_linear(rows, weight, torch.tensor(counts))
    assert torch.equal(together, torch.cat(one_by_one))


def test_few_numbers_of_rows_are_multiplied():
    sizes = {experts._rounded_up(count) for count in range(1, 4097)}
    assert len(sizes) <= 80
    assert all(count <= experts._rounded_up(count) <= 1.125 * count for count in range(1, 4097))
