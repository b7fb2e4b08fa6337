"""Small real models, saved as their transformers classes save them."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import recent_models
from recent_models import BASE, HEAD_DIM, RECENT

_MLA = {
    "num_key_value_heads": 4,
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
    "llama": ("Llama", BASE | HEAD_DIM),
    "qwen2": ("Qwen2", BASE),
    "qwen3": ("Qwen3", BASE | HEAD_DIM | {"tie_word_embeddings": True}),
    "qwen2_moe": (
        "Qwen2Moe",
        BASE
        | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": ("Qwen3Moe", BASE | HEAD_DIM | {"num_experts": 4, "moe_intermediate_size": 32}),
    "mixtral": ("Mixtral", BASE | HEAD_DIM | {"num_local_experts": 4}),
    "minimax_m2": ("MiniMaxM2", BASE | HEAD_DIM | {"num_local_experts": 4}),
    "deepseek_v3": ("DeepseekV3", BASE | _MLA),
    "glm4_moe": (
        "Glm4Moe",
        BASE
        | HEAD_DIM
        | {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        BASE
        | HEAD_DIM
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        BASE
        | HEAD_DIM
        | {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 48,
            "moe_latent_size": 32,
        },
    ),
    "gpt_oss": (
        "GptOss",
        BASE
        | HEAD_DIM
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "minimax_m3_vl": (
        "MiniMaxM3VL",
        BASE
        | HEAD_DIM
        | {
            "rotary_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "shared_intermediate_size": 32,
            "dense_intermediate_size": 96,
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 8,
            "index_topk_blocks": 2,
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        BASE
        | HEAD_DIM
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
        },
    ),
}

SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2", BASE | HEAD_DIM),
    "cohere": ("Cohere", BASE | {"logit_scale": 0.06}),
    "granite": ("Granite", BASE | {"logits_scaling": 8.0}),
    "falcon_h1": (
        "FalconH1",
        BASE
        | HEAD_DIM
        | {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
            "lm_head_multiplier": 0.25,
        },
    ),
    "gemma4_text": (
        "Gemma4Text",
        BASE
        | HEAD_DIM
        | {
            "global_head_dim": 16,
            "enable_moe_block": False,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "falcon": (
        "Falcon",
        {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
        | {"ffn_hidden_size": 96, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "hrm_text": (
        "HrmText",
        {key: value for key, value in BASE.items() if key != "num_key_value_heads"} | HEAD_DIM,
    ),
    "zamba2": (
        "Zamba2",
        BASE
        | {
            "num_hidden_layers": 6,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid"] * 3,
            "num_mem_blocks": 1,
            "mamba_d_state": 16,
            "mamba_headdim": 16,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "attention_head_dim": 32,
            "attention_hidden_size": 128,
            "use_shared_attention_adapter": False,
            "adapter_rank": 8,
        },
    ),
}
"""Models that single tests need for what is special about them."""

_VISION: dict[str, dict[str, Any]] = {
    "minimax_m3_vl": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "image_token_index": 3,
        "video_token_index": 4,
        "projector_hidden_size": 64,
    },
    "qwen3_vl_moe": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "depth": 1,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        "image_token_id": 3,
        "video_token_id": 4,
        "vision_start_token_id": 5,
        "vision_end_token_id": 6,
    },
}
"""What models that see images have beside `text_config`."""

_CLASSES = {
    "minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "gemma4_text": "Gemma4ForCausalLM",
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

    torch.manual_seed(seed)
    with contextlib.redirect_stderr(io.StringIO()):
        model = recent_models.built(kind, **changes) if kind in RECENT else _built(kind, changes)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    if kind == "qwen3_vl_moe":
        change_tensors(folder, _transpose_experts)
    return folder


def _built(kind: str, changes: dict[str, Any]) -> Any:
    import transformers

    name, settings = (MODELS | SPECIAL)[kind]
    settings = settings | changes
    if kind in _VISION:
        settings = {"text_config": settings} | _VISION[kind]
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, _CLASSES.get(kind, f"{name}ForCausalLM"))(config)


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite every weight file of `folder` after `change` of its tensors by name."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


def _transpose_experts(tensors: dict[str, Any]) -> None:
    """As Qwen publishes them; transformers saves [E, N, K]."""
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensors[name] = tensor.transpose(1, 2).contiguous()
