"""Miniatures as publishers save them: with draft layers, in block FP8, with all their keys."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from searchable import save_searchable
from tiny_models import change_tensors

ARCHITECTURES = (
    "llama",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "mixtral",
    "minimax_m2",
    "minimax_m3_vl",
    "deepseek_v3",
    "glm4_moe",
    "nemotron_h",
    "gpt_oss",
    "qwen3_vl_moe",
    "gemma2",
    "gemma3",
    "gemma4_text",
    "gemma4_moe",
    "cohere2",
    "granite",
    "falcon_h1",
    "glm_moe_dsa",
    "deepseek_v32",
    "deepseek_v4",
    "kimi_linear",
    "qwen3_5",
    "qwen3_5_moe",
    "lfm2",
    "lfm2_moe",
    "zamba2",
    "olmo_hybrid",
    "llama4",
)
BLOCK_FP8 = ("minimax_m2", "deepseek_v3")
"""Architectures whose publishers store E4M3 codes with one scale for each block of 128 x 128."""

KEPT = {"minimax_m2": ["gate", "e_score_correction_bias", "lm_head"], "deepseek_v3": []}
"""`modules_to_not_convert` as published."""

ONLY_PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma2": {"hidden_act": "gelu_pytorch_tanh"},
    "qwen3_next": {"full_attention_interval": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "mamba_n_groups": 2,
        "mtp_layers_block_type": ["attention", "moe"],
    },
    "minimax_m2": {"rotary_dim": 8, "scoring_func": "sigmoid", "use_routing_bias": True},
    "deepseek_v3": {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "deepseek_v32": {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "deepseek_v4": {
        "compress_ratios": [128, 4],
        "num_hash_layers": 1,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "topk_method": "noaux_tc",
    },
    "glm_moe_dsa": {
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "lfm2": {"conv_dim": 64, "conv_dim_out": 64, "block_dim": 64, "block_ff_dim": 96},
    "kimi_linear": {
        "first_k_dense_replace": 1,
        "linear_attn_config": {
            "full_attn_layers": [2],
            "head_dim": 16,
            "kda_layers": [1],
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        "mla_use_nope": True,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
    },
    "llama4": {"interleave_moe_layer_step": 2},
    "lfm2_moe": {"conv_dim": 64, "conv_dim_out": 64},
}
"""Keys of the publishers' config.json that transformers does not save; engines read them."""

PUBLISHED_NAMES = {
    "deepseek_v4": {
        r"^model\.(layers|norm)\.": r"\1.",
        r"^model\.embed_tokens\.": "embed.",
        r"^model\.hc_head\.hc_": "hc_head_",
        r"\.attn\.norm\.": ".attn.kv_norm.",
    },
    "kimi_linear": {r"layers\.0\.block_sparse_moe\.": "layers.0.mlp."},
    "olmo_hybrid": {
        "attention_layer_norm": "input_layernorm",
        "feedforward_layer_norm": "post_attention_layernorm",
    },
}
"""Publishers' names where transformers 5.23, which reads both, saves others."""

BLOCK = 128
_CODES = re.compile(r".+\.layers\..+(_proj|_proj_with_mqa|\.w[123])\.weight")


def save_published(kind: str, folder: Path) -> Path:
    """The architecture `kind`, or `kind`-fp8 for it in block FP8, with a tokenizer of bytes.

    Some dimensions are larger than a block and no multiple of it, as DeepSeek's are.
    """
    base = kind.removesuffix("-fp8")
    in_blocks = base != kind
    changes: dict[str, Any] = {"max_position_embeddings": 128}
    if base == "qwen3_moe":
        changes["num_experts_per_tok"] = 2
    if in_blocks:
        changes |= {"intermediate_size": 160, "hidden_size": 144}
    save_searchable(base, folder, **changes)
    add_draft_layers(base, folder)
    if base in PUBLISHED_NAMES:
        change_tensors(folder, lambda tensors: rename(tensors, PUBLISHED_NAMES[base]))
    if base == "minimax_m3_vl":
        write_keys_of_minimax_m3(folder)
    if base == "qwen3_vl_moe":
        change_text_config(folder, norm_topk_prob=True)
    change_config(folder, **ONLY_PUBLISHED.get(base, {}))
    if in_blocks:
        store_in_blocks(folder, KEPT[base])
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_text_config(folder: Path, **changes: Any) -> None:
    """Set keys of the language model's part of config.json."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, text_config=text | changes)


def add_draft_layers(kind: str, folder: Path) -> None:
    """Multi-token prediction layers, which transformers does not build."""
    prefixes = {
        "deepseek_v3": ("model.layers.1.", "model.layers.2."),
        "glm4_moe": ("model.layers.1.", "model.layers.2."),
        "qwen3_next": ("model.layers.1.", "mtp.layers.0."),
        "nemotron_h": ("backbone.layers.1.", "mtp.layers.0."),
    }
    if kind not in prefixes:
        return
    last, draft = prefixes[kind]

    def add(tensors: dict[str, torch.Tensor]) -> None:
        copies = {
            name.replace(last, draft): tensor.flip(0)
            for name, tensor in tensors.items()
            if name.startswith(last)
        }
        tensors |= copies | {f"{draft}eh_proj.weight": torch.ones(64, 128, dtype=torch.bfloat16)}

    change_tensors(folder, add)
    change_config(folder, num_nextn_predict_layers=1)


def rename(tensors: dict[str, torch.Tensor], names: Mapping[str, str]) -> None:
    """Replace expressions in the tensors' names."""
    for name in list(tensors):
        tensors[published(name, names)] = tensors.pop(name)


def published(name: str, names: Mapping[str, str]) -> str:
    """A tensor's name with expressions in it replaced."""
    for pattern, replacement in names.items():
        name = re.sub(pattern, replacement, name)
    return name


def write_keys_of_minimax_m3(folder: Path) -> None:
    """What MiniMax-M3's config.json says beside what transformers saves."""
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    sparse = {
        "sparse_num_index_heads": text["index_n_heads"],
        "sparse_index_dim": text["index_head_dim"],
        "sparse_block_size": text["index_block_size"],
        "sparse_topk_blocks": text["index_topk_blocks"],
        "sparse_local_block": text["index_local_blocks"],
        "sparse_attention_freq": [0, 1],
        "sparse_disable_index_value": [0, 1],
    }
    text |= {
        "hidden_act": "swigluoai",
        "moe_layer_freq": [0, 1],
        "n_shared_experts": 1,
        "partial_rotary_factor": 0.5,
        "qk_norm_type": "per_head",
        "rope_theta": 10000.0,
        "scoring_func": "sigmoid",
        "sparse_attention_config": sparse,
        "swiglu_beta": 1.0,
        "use_gemma_norm": True,
        "use_routing_bias": True,
    }
    vision |= {
        "img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2},
        "position_embedding_type": "rope",
        "rope_mode": "3d",
        "vision_segment_max_frames": 4,
    }
    change_config(folder, text_config=text, vision_config=vision)


def store_in_blocks(folder: Path, kept: Iterable[str]) -> None:
    """Replace the linears of the layers by E4M3 codes and `weight_scale_inv`."""

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if _CODES.fullmatch(name)]:
            tensors[name], tensors[f"{name}_scale_inv"] = _in_blocks(tensors[name].float())

    change_tensors(folder, quantize)
    declared = {
        "quant_method": "fp8",
        "fmt": "float8_e4m3fn",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    if kept:
        declared["modules_to_not_convert"] = list(kept)
    change_config(folder, quantization_config=declared)


def _in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and scales [N / 128, K / 128], rounded up, float32."""
    blocks = [rows.split(BLOCK, dim=1) for rows in weight.split(BLOCK, dim=0)]
    scale = torch.tensor([[block.abs().max() / 448 for block in row] for row in blocks])
    codes = [
        torch.cat([block / own for block, own in zip(row, scales, strict=True)], dim=1)
        for row, scales in zip(blocks, scale, strict=True)
    ]
    return torch.cat(codes).to(torch.float8_e4m3fn), scale
