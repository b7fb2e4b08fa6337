"""Models that scale or cap their logits behind the head: what is measured is what they give."""

import json
import math

import pytest
import torch
from searchable import TOKEN_FLAGS, save_searchable
from test_scores import SPLIT
from torch.nn import functional

from autoquant.errors import SourceError
from autoquant.formats import FP8
from autoquant.measure.calibration import calibrate
from autoquant.measure.scorer import Scorer
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

KINDS = ("gemma2", "cohere", "granite", "gemma4_text", "falcon_h1")


def expected(kind, config, z):
    """The steps as the architecture's publication has them."""
    if kind in ("gemma2", "gemma4_text"):
        return config.final_logit_softcapping * torch.tanh(z / config.final_logit_softcapping)
    factor = {
        "cohere": lambda: config.logit_scale,
        "granite": lambda: 1 / config.logits_scaling,
        "falcon_h1": lambda: config.lm_head_multiplier,
    }
    return factor[kind]() * z


@pytest.fixture(scope="module", params=KINDS)
def measured(request, tmp_path_factory):
    folder = save_searchable(request.param, tmp_path_factory.mktemp(request.param) / "source")
    groups = find_groups(open_source(folder))
    model = load_model(folder, torch.device("cpu")).model
    scorer = Scorer(QuantizedModel(model, groups, mode=ActivationMode.W4A4), torch.device("cpu"))
    scorer.check(SPLIT)
    scorer.quantized.set_input_scales(calibrate(scorer, SPLIT, lambda: None).scales())
    return request.param, folder, scorer


def test_kl_is_that_of_the_changed_logits(measured):
    kind, _, scorer = measured
    model, tokens = scorer.quantized.model, SPLIT.batches[0]
    assignment = Assignment.of({group.name: FP8 for group in scorer.quantized.groups})
    logits = []
    for own in (Assignment.of({}), assignment):
        (hidden,) = scorer.forward([tokens], own)
        scorer.quantized.apply(own)
        with torch.inference_mode():
            hidden, weight = scorer.quantized.operands(scorer.trunk.head, hidden)
            z = functional.linear(hidden.double(), weight.double()).flatten(0, 1)
        scorer.quantized.choose({})
        logits.append(expected(kind, model.config, z).log_softmax(-1))
    p, q = logits
    kl = (p.exp() * (p - q)).sum(-1)
    ((found,),) = scorer.score_batches([[assignment]], SPLIT, [0])
    assert kl.mean() > 1e-5
    torch.testing.assert_close(torch.from_numpy(found.kl), kl, rtol=1e-3, atol=1e-6)


def test_gradients_go_through_the_change(measured):
    kind, _, scorer = measured
    (hidden,) = scorer.forward([SPLIT.batches[0]])
    direction = torch.randn(scorer.trunk.head.weight.shape[0], generator=torch.manual_seed(0))
    found = scorer.head.pull_back(hidden, lambda z: direction.expand_as(z))
    wide = hidden.double().requires_grad_()
    z = functional.linear(wide, scorer.trunk.head.weight.double())
    (expected(kind, scorer.quantized.model.config, z) * direction).sum().backward()
    torch.testing.assert_close(found.double(), wide.grad, rtol=0.02, atol=0.02)


def test_a_change_that_mixes_logits_is_refused(measured, monkeypatch):
    _, _, scorer = measured
    model = scorer.quantized.model
    forward = type(model).forward

    def mixing(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        found.logits = found.logits - found.logits.amax(dim=(1, 2), keepdim=True)
        return found

    monkeypatch.setattr(type(model), "forward", mixing)
    with pytest.raises(SourceError, match="does more to its logits"):
        scorer.check(SPLIT)


def test_logits_that_are_nan_are_named_as_such(measured, monkeypatch):
    _, _, scorer = measured
    head, trunk = scorer.trunk.head, scorer.trunk
    monkeypatch.setattr(trunk, "is_whole", trunk.is_whole)
    with torch.no_grad():
        before = head.weight[0, 0].clone()
        head.weight[0, 0] = math.nan
    try:
        with pytest.raises(SourceError, match="in BF16 hold NaN"):
            scorer.check(SPLIT)
    finally:
        with torch.no_grad():
            head.weight[0, 0] = before


@pytest.mark.slow
def test_a_model_with_capped_logits_is_searched(tmp_path, autoquant):
    source = save_searchable("gemma2", tmp_path / "source")
    run = tmp_path / "run"
    done = autoquant(
        *("search", source, "--budget-bpe", "11", "--out", run, "--no-mlflow", "--trials", 2),
        *("--calibration", "stdlib"),
        *TOKEN_FLAGS,
    )
    assert done.exit_code == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert 0 < result["kl"]["mean"] < 1
