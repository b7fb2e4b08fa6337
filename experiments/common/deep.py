"""Write a Llama of random weights with more than a hundred layer groups, for timings alone.

    python -m experiments.common.deep --out runs/models

26 blocks of four groups, with the tokenizer of the bundled reference model. What such a model's KL
says means nothing; how long its probes and candidates take does not depend on the weights.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autoquant.source.source import REFERENCE_MODEL, open_source

BLOCKS = 26


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = open_source(REFERENCE_MODEL).config["vocab_size"]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for path in REFERENCE_MODEL.glob("tokenizer*"):
        shutil.copy(path, folder)
    print(f"{folder}: {4 * BLOCKS} groups")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    write(parser.parse_args().out / "deep")


if __name__ == "__main__":
    main()
