"""Small real models, saved as their transformers classes save them."""

import contextlib
import io
from pathlib import Path
from typing import Any

_DENSE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEAD_DIM = {"head_dim": 16}
_MLA = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _DENSE | _HEAD_DIM),
    "qwen2": ("Qwen2", _DENSE),
    "qwen3": ("Qwen3", _DENSE | _HEAD_DIM | {"tie_word_embeddings": True}),
    "qwen2_moe": (
        "Qwen2Moe",
        _DENSE
        | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": ("Qwen3Moe", _DENSE | _HEAD_DIM | {"num_experts": 4, "moe_intermediate_size": 32}),
    "mixtral": ("Mixtral", _DENSE | _HEAD_DIM | {"num_local_experts": 4}),
    "minimax_m2": ("MiniMaxM2", _DENSE | _HEAD_DIM | {"num_local_experts": 4}),
    "deepseek_v3": ("DeepseekV3", _DENSE | _MLA),
    "glm4_moe": (
        "Glm4Moe",
        _DENSE
        | _HEAD_DIM
        | {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
}


def save_model(
    kind: str,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    shard_size: str = "10MB",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Make the model `kind` with random weights and save it to `folder`."""
    import torch
    import transformers

    name, settings = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**(settings | changes))
    torch.manual_seed(seed)
    with contextlib.redirect_stderr(io.StringIO()):
        model = getattr(transformers, f"{name}ForCausalLM")(config).to(getattr(torch, dtype))
        model.save_pretrained(folder, max_shard_size=shard_size)
    return folder
