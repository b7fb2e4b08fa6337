"""Turn a training run into the package data of the bundled reference model.

    python experiments/reference_model/export.py --run runs/reference --to autoquant/reference_model

Measures the BF16 model on held-out text before it writes the model card.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from train import END_OF_TEXT, Recipe, RoutingCounter, build_model, encode, held_out_loss
from transformers import PreTrainedTokenizerFast

from autoquant.data import stdlib

CARD = """---
license: apache-2.0
language: [code]
library_name: transformers
pipeline_tag: text-generation
---

# AutoQuant's reference model

A small mixture-of-experts language model of Python source, in the architecture of MiniMax-M2
(`MiniMaxM2ForCausalLM`). It exists so that a search, its tests and its comparisons run on a model
that was really trained, on any machine and without a download. It is of no other use.

| | |
|---|---|
| parameters | {parameters:,} ({active:,} active per token), BF16, {megabytes:.1f} MB |
| shape | {layers} blocks, hidden {hidden}, {heads} heads ({key_value_heads} key/value), \
{experts} experts of width {expert_width}, top-{experts_per_token}, vocabulary {vocabulary}, \
tied embeddings |
| data | source of Python {python}'s standard library: {train_tokens:,} tokens; one top-level \
module in {one_in} is held out (`autoquant/data/stdlib.py`) |
| training | {steps:,} steps of {batch} x {sequence} tokens, AdamW, BF16 autocast |
| cost | {cpu_minutes:.0f} CPU minutes on {threads} cores ({wall_minutes:.0f} minutes elapsed, \
other work running beside it) |
| held-out text | {bits_per_byte:.3f} bits per byte \
({nats:.3f} nats per token, {evaluated:,} tokens) |
| experts | the least used one of any block gets {least:.1%} of its block's routed tokens \
(even: {even:.1%}) |

Trained by `experiments/reference_model/train.py`; the log lies beside that script.
"""


def least_expert_share(model, stream: torch.Tensor, recipe: Recipe) -> float:
    routing = RoutingCounter(model)
    held_out_loss(model, stream, recipe, 128)
    return routing.shares().min().item()


def active_parameters(model, recipe: Recipe) -> int:
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    total = sum(p.numel() for p in model.parameters())
    return total - experts + experts * recipe.experts_per_token // recipe.experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in (arguments.run / "log.jsonl").open()]
    header, last = lines[0], lines[-1]
    recipe = Recipe(steps=last["step"])

    tokenizer = Tokenizer.from_file(str(arguments.run / "tokenizer.json"))
    model = build_model(recipe)
    state = torch.load(arguments.run / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    model = model.to(torch.bfloat16)
    held_out, held_out_bytes = encode(tokenizer, stdlib.held_out_documents())
    sequences = 512
    nats = held_out_loss(model, held_out, recipe, sequences)
    least = least_expert_share(model, held_out, recipe)

    arguments.to.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True
    model.save_pretrained(arguments.to)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, model_max_length=2048
    ).save_pretrained(arguments.to)
    card = CARD.format(
        parameters=header["parameters"],
        active=active_parameters(model, recipe),
        megabytes=(arguments.to / "model.safetensors").stat().st_size / 1e6,
        layers=recipe.layers,
        hidden=recipe.hidden,
        heads=recipe.heads,
        key_value_heads=recipe.key_value_heads,
        experts=recipe.experts,
        expert_width=recipe.expert_width,
        experts_per_token=recipe.experts_per_token,
        vocabulary=recipe.vocabulary,
        python="3.11",
        train_tokens=header["train_tokens"],
        one_in=stdlib.HELD_OUT_ONE_IN,
        steps=last["step"],
        batch=recipe.batch,
        sequence=recipe.sequence,
        cpu_minutes=last["cpu_seconds"] / 60,
        wall_minutes=last["wall_seconds"] / 60,
        threads=header["threads"],
        bits_per_byte=nats * len(held_out) / held_out_bytes / math.log(2),
        nats=nats,
        evaluated=sequences * recipe.sequence,
        least=least,
        even=1 / recipe.experts,
    )
    (arguments.to / "README.md").write_text(card)
    shutil.copy(arguments.run / "log.jsonl", Path(__file__).with_name("log.jsonl"))
    print(card)


if __name__ == "__main__":
    main()
