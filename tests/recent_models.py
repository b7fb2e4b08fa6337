"""Architectures of 2026 in small: what transformers' configuration of each is made with."""

from typing import Any

BASE: dict[str, Any] = {
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
HEAD_DIM = {"head_dim": 16}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_GDN = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = _EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}
_INDEXER = {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 8}
_KDA = {"linear_head_dim": 16, "linear_num_heads": 4}

RECENT: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", HEAD_DIM | _SLIDING | {"query_pre_attn_scalar": 16}),
    "gemma4_moe": (
        "gemma4_text",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "head_dim": 16,
            "global_head_dim": 16,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        },
    ),
    "cohere2": ("cohere2", HEAD_DIM | _SLIDING | {"logit_scale": 0.06}),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        _MLA | _ROUTED | _INDEXER | {"mlp_layer_types": ["dense", "sparse"]},
    ),
    "deepseek_v32": ("deepseek_v32", _MLA | _ROUTED | _INDEXER | {"first_k_dense_replace": 1}),
    "deepseek_v4": (
        "deepseek_v4",
        _EXPERTS
        | _INDEXER
        | {
            "num_key_value_heads": 1,
            "head_dim": 512,
            "index_head_dim": 128,
            "q_lora_rank": 32,
            "o_lora_rank": 32,
            "o_groups": 2,
            "n_routed_experts": 4,
            "hc_mult": 2,
            "sliding_window": 16,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "compress_rates": {
                "compressed_sparse_attention": 4,
                "heavily_compressed_attention": 128,
            },
            "mlp_layer_types": ["hash_moe", "moe"],
            "num_nextn_predict_layers": 0,
        },
    ),
    "kimi_linear": (
        "kimi_linear",
        _MLA
        | _KDA
        | _LINEAR
        | {
            "q_lora_rank": None,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "moe_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "qwen3_5": ("qwen3_5_text", HEAD_DIM | _GDN | _LINEAR),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        HEAD_DIM
        | _GDN
        | _LINEAR
        | _EXPERTS
        | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "lfm2_moe": (
        "lfm2_moe",
        _EXPERTS
        | {"layer_types": ["conv", "full_attention"], "num_experts": 4, "num_dense_layers": 1},
    ),
    "olmo_hybrid": ("olmo_hybrid", _LINEAR | _GDN | {"linear_num_key_heads": 4}),
    "llama4": (
        "llama4_text",
        HEAD_DIM
        | {
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "moe_layers": [1],
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 16,
        },
    ),
}
"""Model types, and settings beside those that all have."""


def built(kind: str, **changes: Any) -> Any:
    """The model with random weights, as transformers' class of its configuration makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = RECENT[kind]
    config = AutoConfig.for_model(model_type, **(BASE | settings | changes))
    return AutoModelForCausalLM.from_config(config)
