"""Gradient estimates against the KL itself where the second order is all there is.

A choice adds a small constant to what one linear gives, in a model in double precision: terms of
higher order and rounding are then below a per cent of the KL.
"""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import MODELS

from autoquant.data.tokens import Split
from autoquant.environment import CpuPolicy
from autoquant.formats import FP8
from autoquant.measure import gradient
from autoquant.measure.gradient import gradient_probe, mean_estimate
from autoquant.measure.scorer import Scorer
from autoquant.model.live_weights import LiveWeights
from autoquant.model.products import CpuProducts
from autoquant.model.replacing import replaced

CPU = torch.device("cpu")
SEQUENCES, SEEDS = 256, 20
SIZE = 0.01
"""Length of what is added, of what the linear gives."""


class Nudged:
    """Stands in for a model with switchable formats: `choose` adds to what one linear gives."""

    def __init__(self, model, linears):
        self.model = model
        self.products = CpuProducts(CpuPolicy.BF16)
        self.weights = LiveWeights({})
        self.linears = linears
        self.groups = [
            SimpleNamespace(name=name, layer=layer, elements=linear.weight.numel())
            for name, layer, linear in linears
        ]
        self.chosen = {}
        generator = torch.Generator().manual_seed(3)
        for name, _, linear in linears:
            shift = torch.randn(linear.out_features, generator=generator, dtype=torch.float64)
            linear.forward = self._added(name, linear.forward, shift)

    def _added(self, name, forward, shift):
        def call(x):
            y = forward(x)
            if name not in self.chosen:
                return y
            return y + SIZE * y.detach().norm(dim=-1).mean() * shift / shift.norm()

        return call

    def modules(self):
        return [(name, linear) for name, _, linear in self.linears]

    def choose(self, choices):
        self.chosen = choices

    def apply(self, assignment, *, with_cache=False):
        self.chosen = dict(assignment)

    def replacing(self, attributes):
        return replaced(attributes)

    def forget_inputs(self):
        pass


@pytest.fixture(scope="module")
def nudged():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**MODELS["llama"][1], initializer_range=0.2)
    model = transformers.LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    first, last = model.model.layers
    return Nudged(
        model,
        [
            ("inside a block", 0, first.mlp.gate_proj),
            ("into attention", 1, last.self_attn.v_proj),
            ("behind attention", 1, last.mlp.down_proj),
        ],
    )


def split_of(length):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 48, (SEQUENCES, length), generator=generator)
    return Split.unrelated("search", (tokens,), f"{length}")


@torch.inference_mode()
def exact_kl(nudged, name, split):
    """Mean over the tokens, nats per token."""

    def log_p():
        return nudged.model(split.batches[0], use_cache=False).logits.log_softmax(dim=-1)

    before = log_p()
    nudged.choose({name: FP8})
    after = log_p()
    nudged.choose({})
    return float((before.exp() * (before - after)).sum(dim=-1).mean())


def estimated(nudged, split):
    """Mean over the seeds of each group's estimate."""
    scorer = Scorer(nudged, CPU)
    keys = [(name, FP8) for name, _, _ in nudged.linears]
    found = [
        mean_estimate(
            keys, split, gradient_probe(scorer, split, keys, (), lambda _: None, seed=seed)
        )
        for seed in range(SEEDS)
    ]
    return {name: sum(e[name, FP8] for e in found) / SEEDS for name, _, _ in nudged.linears}


def test_estimates_are_the_kl_to_second_order(nudged):
    """A sequence is one window, so nothing is left out; 5,120 draws know the mean to 2 %.

    Attention hands what is added to each token's values on to all tokens behind it: squared before
    they are summed, these effects make half of the KL.
    """
    split = split_of(8)
    found = estimated(nudged, split)
    for name, _, _ in nudged.linears:
        kl = exact_kl(nudged, name, split)
        assert 1e-6 < kl < 1e-2
        assert found[name] == pytest.approx(kl, rel=0.05)


def test_a_window_is_eight_tokens_whose_effects_are_summed_before_they_are_squared():
    effects = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, -8, 3, -1], [0.0] * 9 + [4.0]])
    found = gradient._kl_of_sequences(effects)
    assert found.tolist() == [(20.0**2 + 2.0**2) / 2, 4.0**2 / 2]
