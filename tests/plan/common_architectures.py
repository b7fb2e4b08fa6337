"""Small models without numbers of every architecture that transformers and vLLM both have."""

import json
from pathlib import Path
from typing import Any

from autoquant.source.engines.tables import FILE
from autoquant.source.source import Source, open_source

SMALL = {"num_hidden_layers": 4} | dict.fromkeys(
    ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 16
)
"""What keeps a default configuration quick; configurations ignore the names that they lack."""

_QUERY_SPARSE = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "dbrx": {"n_layers": 2, "attn_config": {"rope_theta": 1e4}},
    "gemma3n_text": {"num_hidden_layers": 30, "num_kv_shared_layers": 10},
    "lfm2_moe": SMALL | {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron": SMALL | {"num_key_value_heads": 8, "head_dim": 64},
    "qwen4_exp": {"text_config": SMALL | _QUERY_SPARSE},
    "qwen4_exp_text": SMALL | _QUERY_SPARSE,
    "zamba2": {},
}
"""Architectures whose defaults do not fit each other or `SMALL`."""

NEEDS_MORE = {
    "gemma3n": "its vision tower is made by timm, which is no dependency",
}
"""Architectures that transformers does not build here, and why."""

TRANSPOSED = ("gpt-sw3", "gpt2")
"""Architectures that store matrices [in, out], none of which is quantized."""


def engine_table(engine: str, architecture: str) -> dict[str, Any] | None:
    """The entry of engines.json, read apart from the package."""
    architectures = json.loads(FILE.read_text())["engines"][engine]["architectures"]
    table = architectures.get(architecture)
    return architectures[table] if isinstance(table, str) else table


def common_kinds() -> list[tuple[str, str]]:
    """Model types with their architectures."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    known = json.loads(FILE.read_text())["engines"]["vLLM"]["architectures"]
    return [(kind, name) for kind, name in NAMES.items() if name in known]


def built(kind: str, architecture: str, folder: Path) -> Source:
    """The source that the architecture's configuration describes."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](**SPECIAL.get(kind, SMALL))
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return open_source(folder, weights=False)
