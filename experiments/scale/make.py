"""A checkpoint of MiniMax-M2's architecture with random weights, of any size.

It is written one block a file, so that memory holds one tensor, with the bundled model's tokenizer
beside it.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autoquant.export.layouts.base import StoredTensor
from autoquant.export.writer import ShardWriter
from autoquant.files import to_json, write_atomic
from autoquant.source.source import REFERENCE_MODEL

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
HEADS, KEY_HEADS, HEAD_DIM = 48, 8, 128
SPREAD = 0.02
"""Standard deviation of the weights."""


def tensors_of_block(settings: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a block is stored with."""
    hidden, width = settings["hidden_size"], settings["intermediate_size"]
    experts, prefix = settings["num_local_experts"], f"model.layers.{layer}"
    attention, moe = f"{prefix}.self_attn", f"{prefix}.block_sparse_moe"
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{attention}.q_proj.weight": (HEADS * HEAD_DIM, hidden),
        f"{attention}.k_proj.weight": (KEY_HEADS * HEAD_DIM, hidden),
        f"{attention}.v_proj.weight": (KEY_HEADS * HEAD_DIM, hidden),
        f"{attention}.o_proj.weight": (hidden, HEADS * HEAD_DIM),
        f"{attention}.q_norm.weight": (HEADS * HEAD_DIM,),
        f"{attention}.k_norm.weight": (KEY_HEADS * HEAD_DIM,),
        f"{moe}.gate.weight": (experts, hidden),
        f"{moe}.e_score_correction_bias": (experts,),
    }
    for expert in range(experts):
        shapes[f"{moe}.experts.{expert}.w1.weight"] = (width, hidden)
        shapes[f"{moe}.experts.{expert}.w2.weight"] = (hidden, width)
        shapes[f"{moe}.experts.{expert}.w3.weight"] = (width, hidden)
    return shapes


def values_of(name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Norms of one, no bias for any expert, and normal weights."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith("e_score_correction_bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    return torch.randn(shape, device=device).mul_(SPREAD).to(torch.bfloat16)


def make(folder: Path, settings: Mapping[str, Any], device: torch.device) -> int:
    """Write the checkpoint; bytes of its weights."""
    config = json.loads((REFERENCE_MODEL / "config.json").read_text())
    config |= {
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_DIM,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        **settings,
    }
    table = (config["vocab_size"], config["hidden_size"])
    outside = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "model.norm.weight": (config["hidden_size"],),
    }
    files = [outside, *(tensors_of_block(config, i) for i in range(config["num_hidden_layers"]))]
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    placed, size = {}, 0
    for number, shapes in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        stored = [StoredTensor(name=n, dtype="BF16", shape=shape) for n, shape in shapes.items()]
        with ShardWriter(folder / file, stored, {"format": "pt"}) as shard:
            for name, shape in shapes.items():
                shard.put(name, values_of(name, shape, device))
        placed |= dict.fromkeys(shapes, file)
        size += shard.data_bytes
    write_atomic(folder / "model.safetensors.index.json", to_json({"weight_map": placed}))
    write_atomic(folder / "config.json", to_json(config, indent=2))
    for name in TOKENIZER:
        shutil.copy(REFERENCE_MODEL / name, folder / name)
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=56)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=32_064)
    arguments = parser.parse_args()
    settings = {
        "num_hidden_layers": arguments.layers,
        "num_local_experts": arguments.experts,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.width,
        "vocab_size": arguments.vocabulary,
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{make(arguments.folder, settings, device):,} bytes")


if __name__ == "__main__":
    main()
