"""Models that see images: their language model is searched, exported in both layouts, verified."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cells import LAYOUTS, Journey
from searchable import save_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 64,
}
LAST_BYTE = 3 + 256
"""Ids behind it stand for no byte of a text: images may have them."""


def rotary(sections: list[int], part: float = 1.0) -> dict[str, Any]:
    """Positions of text, height and width."""
    kind = {"rope_type": "default", "rope_theta": 10000.0}
    return {"rope_parameters": kind | {"mrope_section": sections, "partial_rotary_factor": part}}


_EXPERTS = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_POSITIONS = {"num_position_embeddings": 16, "deepstack_visual_indexes": []}

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (rotary([2, 3, 3]), {"fullatt_block_indexes": [0]}),
    "qwen3_vl": (rotary([2, 3, 3]), _POSITIONS),
    "qwen3_5": (_LINEAR | rotary([2, 3, 3]), _POSITIONS),
    "qwen3_5_moe": (
        _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 32} | rotary([2, 3, 3]),
        _POSITIONS,
    ),
    "gemma3": ({}, {}),
    "mistral3": ({"model_type": "mistral"}, {}),
    "llama4": (
        {
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "moe_layers": [1],
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 16,
        },
        {},
    ),
    "internvl": ({"model_type": "qwen2"}, {"image_size": [28, 28], "patch_size": [14, 14]}),
    "paligemma": ({"model_type": "gemma2"}, {}),
    "glm4v": (rotary([2, 3, 3]), {}),
    "glm4v_moe": (_EXPERTS | {"first_k_dense_replace": 1} | rotary([1, 1, 2], 0.5), {}),
}
"""Settings of the language model and of the vision tower, besides those that all have."""


def save(kind: str, folder: Path) -> Path:
    """The model with random weights and a tokenizer of bytes."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, vision = KINDS[kind]
    config = AutoConfig.for_model(
        kind, text_config=TEXT | text, vision_config=VISION | vision, mm_tokens_per_image=4
    )
    free = iter(range(LAST_BYTE + 1, TEXT["vocab_size"]))
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")) and value is not None and value > LAST_BYTE:
            setattr(config, name, next(free))
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    monkeypatch.setattr("autoquant.report.html.write_report", lambda record: None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model_with_a_vision_tower_goes_all_the_way(kind, autoquant, tmp_path):
    journey = Journey(save(kind, tmp_path / "source"), tmp_path, autoquant)
    plan = journey.plan()
    assert not any("visual" in g["name"] or "vision" in g["name"] for g in plan["groups"])
    found = journey.search(plan)
    forward = journey.verify(journey.run / "checkpoint", "--forward")["forward"]
    assert forward["kl"] == pytest.approx(forward["said"], rel=0.05)
    assert journey.score(journey.run / "checkpoint")["kl"] == found["kl"]
    for number, assignment in enumerate(journey.mixes(plan)):
        exported = [journey.export(assignment, own, f"{own}-{number}") for own in LAYOUTS]
        counts = [journey.verify(folder)["linears"] for folder in exported]
        assert counts[0] == counts[1]
        assert min(counts[0].values()) > 0
