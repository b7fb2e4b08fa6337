"""The bundled model is what its card says: small, trained, and with every expert in use."""

import math

import pytest
import torch

from autoquant.data.stdlib import held_out_documents
from autoquant.data.text import load_corpus
from autoquant.data.tokens import Split, TokenPlan, make_splits
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import LoadedModel, load_model
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import load_space
from autoquant.source.source import REFERENCE_MODEL, open_source

MAX_BYTES = 24_000_000


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(REFERENCE_MODEL, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokens(loaded: LoadedModel) -> Split:
    plan = TokenPlan(calibration=8_192, search=256, report=256)
    return make_splits(load_corpus(), loaded.tokenizer, plan)["calibration"]


def test_package_data_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in REFERENCE_MODEL.iterdir()) <= MAX_BYTES


@pytest.mark.slow
@torch.inference_mode()
def test_held_out_text_costs_at_most_two_bits_per_byte(loaded: LoadedModel, tokens: Split) -> None:
    text = next(text for _, text in held_out_documents())
    bytes_per_token = len(text.encode()) / len(loaded.tokenizer(text)["input_ids"])
    losses = [loaded.model(batch, labels=batch).loss.item() for batch in tokens.batches]
    bits_per_byte = sum(losses) / len(losses) / math.log(2) / bytes_per_token
    assert 0.5 < bits_per_byte <= 2.0


@pytest.mark.slow
def test_no_expert_is_dead(loaded: LoadedModel, tokens: Split) -> None:
    plan = make_plan(open_source(REFERENCE_MODEL), load_space("default"))
    quantized = QuantizedModel(loaded.model, plan.groups, mode=ActivationMode.W4A4)
    with quantized.observing(), torch.inference_mode():
        for batch in tokens.batches:
            loaded.model(batch)
    counts = quantized.expert_counts()
    assert len(counts) == 6
    for block, seen in counts.items():
        assert len(seen) == 8
        assert min(seen) > 0.02 * sum(seen), f"{block}: {seen}"
