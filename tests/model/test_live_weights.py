"""What a model in memory multiplies with: exactly what is exported, and BF16 again afterwards."""

import itertools

import autoquant_kernels as kernels
import pytest
import torch
from searchable import save_searchable

from autoquant.export.export import export
from autoquant.export.read_back import open_quantized
from autoquant.formats import BF16, FP8, NVFP4, PLAIN_RULES, Choice
from autoquant.model.binding import DenseSlot
from autoquant.model.inputs import InputScale
from autoquant.model.install import install
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

CHOICES = (*(Choice(NVFP4.format, rule) for rule in PLAIN_RULES), FP8)
TOKENS = torch.arange(3, 67).view(2, 32)


class Live:
    """A model with its groups and a range for every input."""

    def __init__(self, folder, mode=ActivationMode.W4A4, cache_bytes=2**31):
        self.source = open_source(folder)
        self.groups = find_groups(self.source)
        self.model = load_model(folder, torch.device("cpu")).model
        self.quantized = QuantizedModel(
            self.model, self.groups, mode=mode, decoded_bytes=cache_bytes
        )
        self.amax = {linear.input_scale_set: 3.0 for linear in self.groups.linears}
        self.quantized.set_input_scales(
            {name: InputScale(amax=amax) for name, amax in self.amax.items()}
        )

    @torch.inference_mode()
    def logits(self):
        try:
            return self.model(input_ids=TOKENS).logits
        finally:
            self.quantized.forget_inputs()

    @torch.inference_mode()
    def weights(self):
        """The weight that every linear multiplies with now, by its tensor name."""
        found = {}
        for _, slot in self.quantized._slots:
            if isinstance(slot, DenseSlot):
                (linear,) = slot.linears
                x = torch.ones(1, linear.in_features, dtype=torch.bfloat16)
                found[linear.tensor] = self.quantized.operands(slot.module, x)[1].clone()
                continue
            hook = slot.module.autoquant_hook
            wide = hook.weight("wide", slot.module.gate_up_proj)
            down = hook.weight("down", slot.module.down_proj)
            parts = zip(slot.wide[::2], slot.wide[1::2], wide, strict=True)
            for gate, up, weight in parts:
                found[gate.tensor], found[up.tensor] = weight.clone().chunk(2)
            found |= {n.tensor: w.clone() for n, w in zip(slot.down, down, strict=True)}
        self.quantized.forget_inputs()
        return found


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "minimax_m2"])
def folder(request, tmp_path_factory):
    return save_searchable(request.param, tmp_path_factory.mktemp(request.param) / "source")


@pytest.fixture(scope="module")
def live(folder):
    return Live(folder)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_weights_in_memory_are_the_exported_ones(live, choice, tmp_path):
    assignment = Assignment.of({group.name: choice for group in live.groups})
    export(live.source, live.groups, assignment, live.amax, tmp_path / "out")
    stored = dict(open_quantized(tmp_path / "out").tensors())
    live.quantized.apply(assignment)
    weights = live.weights()
    live.quantized.choose({})
    assert weights.keys() == {linear.tensor for linear in live.groups.linears}
    assert all(torch.equal(weight, stored[name]) for name, weight in weights.items())


def test_a_small_cache_gives_the_same_weights(folder, live):
    choices = itertools.cycle(CHOICES)
    assignment = Assignment.of({group.name: next(choices) for group in live.groups})
    small = Live(folder, cache_bytes=10_000)
    for each in (live, small):
        each.quantized.apply(assignment)
    assert torch.equal(small.logits(), live.logits())
    live.quantized.choose({})


def test_bf16_comes_back_to_the_bit(live):
    before = live.logits()
    for choice in CHOICES:
        live.quantized.apply(Assignment.of({group.name: choice for group in live.groups}))
        assert not torch.equal(live.logits(), before)
        live.quantized.choose({})
        assert torch.equal(live.logits(), before)


def test_an_installed_checkpoint_gives_the_logits_of_its_assignment(folder, live, tmp_path):
    choices = itertools.cycle((*CHOICES, BF16))
    assignment = Assignment.of({group.name: next(choices) for group in live.groups})
    export(live.source, live.groups, assignment, live.amax, tmp_path / "out")
    live.quantized.apply(assignment)
    expected = live.logits()
    live.quantized.choose({})
    other = Live(folder)
    checkpoint = open_quantized(tmp_path / "out")
    other.quantized.apply(install(checkpoint, other.source, other.quantized))
    assert torch.equal(other.logits(), expected)


def test_linears_that_read_together_share_one_quantized_input(live, monkeypatch):
    calls = []
    real = kernels.fake_quant_nvfp4

    def counted(x, scale):
        calls.append(x.shape)
        return real(x, scale)

    monkeypatch.setattr(kernels, "fake_quant_nvfp4", counted)
    qkv = next(g.name for g in live.groups if g.role == "qkv")
    live.quantized.choose({qkv: CHOICES[0]})
    live.logits()
    assert calls == [torch.Size([2, 32, 64])]
    live.quantized.choose({})


def test_w4a16_leaves_the_inputs_of_nvfp4_alone(folder, live, monkeypatch):
    w4a16 = Live(folder, mode=ActivationMode.W4A16)
    nvfp4 = Assignment.of({group.name: CHOICES[0] for group in live.groups})
    fp8 = Assignment.of({group.name: FP8 for group in live.groups})
    for assignment, is_same in ((nvfp4, False), (fp8, True)):
        for each in (live, w4a16):
            each.quantized.apply(assignment)
        assert torch.equal(w4a16.logits(), live.logits()) is is_same
    live.quantized.choose({})
    monkeypatch.setattr(kernels, "fake_quant_nvfp4", None)
    w4a16.quantized.apply(nvfp4)
    w4a16.logits()
