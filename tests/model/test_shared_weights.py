"""Layers that share a weight by reference: every use of it is observed, and multiplies with it."""

import pytest
import torch
from searchable import save_searchable

from autoquant.data.tokens import Split
from autoquant.formats import NVFP4
from autoquant.measure.calibration import calibrate
from autoquant.measure.scorer import Scorer
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

TOKENS = torch.randint(3, 200, (4, 16), generator=torch.manual_seed(0))
SPLIT = Split.unrelated("search", (TOKENS,), digest="tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_searchable("zamba2", tmp_path_factory.mktemp("zamba2") / "source")


@pytest.fixture
def scorer(folder):
    model = load_model(folder, torch.device("cpu")).model
    groups = find_groups(open_source(folder))
    quantized = QuantizedModel(model, groups, mode=ActivationMode.W4A16)
    return Scorer(quantized, torch.device("cpu"))


def shared(scorer):
    return [group for group in scorer.quantized.groups if "shared_transformer" in group.name]


def test_a_shared_weight_is_quantized_wherever_it_is_used(folder, scorer):
    groups = shared(scorer)
    choices = {group.name: NVFP4 for group in groups}
    found = scorer.score(Assignment.of(choices), SPLIT).mean

    plain = load_model(folder, torch.device("cpu")).model
    for group in groups:
        for linear in group.linears:
            unit = {unit.name: unit for unit in scorer.quantized.book.units(group)}[linear.name]
            packed = scorer.quantized.book.unit(group, unit, NVFP4)
            plain.get_parameter(linear.tensor).data.copy_(packed.decode())
    logits = [own(TOKENS, use_cache=False).logits.double() for own in (_bf16(folder), plain)]
    p, q = (own.log_softmax(-1) for own in logits)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert found == pytest.approx(expected, rel=0.05)


def _bf16(folder):
    return load_model(folder, torch.device("cpu")).model


def test_inputs_of_every_use_are_observed(folder, scorer):
    largest: dict[str, float] = {}
    plain = _bf16(folder)
    linears = {linear.tensor: linear for group in shared(scorer) for linear in group.linears}
    weights = {id(plain.get_parameter(name)): linear for name, linear in linears.items()}
    uses = 0
    for module in plain.modules():
        linear = weights.get(id(getattr(module, "weight", None)))
        if linear is None:
            continue
        uses += 1

        def see(_, inputs, name=linear.input_scale_set):
            largest[name] = max(largest.get(name, 0.0), inputs[0].abs().max().item())

        module.register_forward_pre_hook(see)
    plain(TOKENS, use_cache=False)
    assert uses == 3 * len(linears)
    observed = calibrate(scorer, SPLIT, lambda: None).input_amax
    assert {name: observed[name] for name in largest} == pytest.approx(largest, rel=0.02)


def test_a_candidate_runs_from_the_first_layer_that_uses_what_changed(scorer):
    scorer.check(SPLIT)
    assert not scorer.trunk.is_whole
    last = max(group.layer for group in scorer.quantized.groups if group.layer is not None)
    for group in scorer.quantized.groups:
        if "shared_transformer" in group.name:
            object.__setattr__(group, "layer", last)  # as if it were stored there
    scorer = Scorer(scorer.quantized, torch.device("cpu"))
    scorer.check(SPLIT)
    whole = Assignment.of({group.name: NVFP4 for group in shared(scorer)})
    (expected,) = scorer.forward([TOKENS], whole)
    scorer.score(Assignment.of({}), SPLIT)
    scorer.score(whole, SPLIT)
    assert torch.equal(scorer._batches[SPLIT.digest, 0].previous.hidden, expected)
