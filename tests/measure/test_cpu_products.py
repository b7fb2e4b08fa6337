"""A processor without BF16 instructions: no product of a measurement is left in BF16."""

import numpy as np
import pytest
import torch
from searchable import save_searchable
from torch.utils._python_dispatch import TorchDispatchMode

from autoquant.data.tokens import Split
from autoquant.formats import FP8, NVFP4
from autoquant.measure.calibration import calibrate
from autoquant.measure.gradient import gradient_probe
from autoquant.measure.scorer import Scorer
from autoquant.measure.sensitivity import probe
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.model.shared_inputs import input_disagreements
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 200, (2, 4, 16), generator=torch.Generator().manual_seed(0))
SPLIT = Split.unrelated("search", tuple(TOKENS), digest="search")
PRODUCTS = ("mm", "bmm", "linear", "matmul", "einsum", "baddbmm", "attention")


class Operands(TorchDispatchMode):
    """Notes the types that products multiply, and keeps what is widened to float32."""

    def __init__(self):
        super().__init__()
        self.types, self.widened = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if any(product in name for product in PRODUCTS):
            self.types |= {(name, t.dtype) for t in tensors if t.is_floating_point()}
        result = func(*args, **(kwargs or {}))
        if name == "_to_copy" and tensors[0].dtype is torch.bfloat16:
            self.widened += [tensors[0]] * (result.dtype is torch.float32)
        return result

    @property
    def in_bf16(self):
        return {name for name, dtype in self.types if dtype is torch.bfloat16}


def opened(folder):
    source = open_source(folder)
    model = load_model(folder, CPU).model
    return QuantizedModel(model, find_groups(source), mode=ActivationMode.W4A4)


@pytest.fixture(params=["llama", "minimax_m2"])
def folder(request, tmp_path):
    return save_searchable(request.param, tmp_path / "source", num_hidden_layers=2)


def measured(folder):
    """Everything that a search does with a model, and its KL."""
    quantized = opened(folder)
    scorer = Scorer(quantized, CPU)
    scorer.check(SPLIT)
    assert input_disagreements(quantized, lambda: scorer.forward([TOKENS[0]])) == ()
    quantized.set_input_scales(calibrate(scorer, SPLIT, lambda: None).scales())
    keys = [(group.name, choice) for group in quantized.groups for choice in (NVFP4, FP8)]
    estimates = gradient_probe(scorer, SPLIT, keys, [], lambda _: None, seed=0)
    exact = probe(scorer, SPLIT, keys, [], lambda _: None)
    scorer.noise(SPLIT)
    kl = scorer.score(Assignment.of(dict.fromkeys((name for name, _ in keys), NVFP4)), SPLIT)
    by_gradient = [probe.kl_sum for estimate in estimates for probe in estimate.probes]
    return kl.kl.mean(), [exact[key] for key in keys], by_gradient


def test_all_products_of_a_search_multiply_float32_copies(folder, monkeypatch):
    monkeypatch.setenv("AUTOQUANT_CPU_PRODUCTS", "bf16")
    with Operands() as as_they_are:
        kl, exact, gradients = measured(folder)
    assert as_they_are.in_bf16
    monkeypatch.setenv("AUTOQUANT_CPU_PRODUCTS", "float32")
    with Operands() as copies:
        kl_of_copies, exact_of_copies, gradients_of_copies = measured(folder)
    assert copies.types
    assert copies.in_bf16 == set()
    assert kl_of_copies == pytest.approx(kl, rel=0.05)
    assert np.corrcoef(exact_of_copies, exact)[0, 1] > 0.99
    assert np.corrcoef(gradients_of_copies, gradients)[0, 1] > 0.99


def test_weights_of_a_candidate_are_widened_once(folder, monkeypatch):
    monkeypatch.setenv("AUTOQUANT_CPU_PRODUCTS", "float32")
    quantized = opened(folder)
    scorer = Scorer(quantized, CPU)
    quantized.set_input_scales(calibrate(scorer, SPLIT, lambda: None).scales())
    weights = {
        module.weight.shape for _, module in quantized.modules() if hasattr(module, "weight")
    }
    candidate = Assignment.of({group.name: NVFP4 for group in quantized.groups})
    with Operands() as first:
        scorer.score(candidate, SPLIT)
    widened = {tensor.data_ptr() for tensor in first.widened if tensor.shape in weights}
    assert widened
    with Operands() as again:
        scorer.score(Assignment.of({}), SPLIT)
        scorer.score(candidate, SPLIT)
    assert not widened & {tensor.data_ptr() for tensor in again.widened}
