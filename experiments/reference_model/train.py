"""Train the bundled reference model: a small mixture-of-experts language model of Python source.

    python experiments/reference_model/train.py --out runs/reference

Deterministic for one machine and thread count, and resumable: started again with the same
arguments it continues from its last checkpoint. `export.py` turns the result into package data.

Shapes: B sequences, L tokens, E experts.
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

from autoquant.data import stdlib
from autoquant.model.memory import keep_freed_memory

END_OF_TEXT = "<|endoftext|>"
PIECES = r"\n *| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z0-9_]+|\s+"
"""One newline with its indentation, a word, a digit, a run of signs, other white space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    vocabulary: int = 1024
    layers: int = 6
    hidden: int = 256
    heads: int = 8
    key_value_heads: int = 4
    expert_width: int = 256
    experts: int = 8
    experts_per_token: int = 2
    sequence: int = 256
    batch: int = 32
    steps: int = 1200
    warmup: int = 60
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    balance_rate: float = 2e-3
    """Step of the routing bias (DeepSeek-V3's balancing without an auxiliary loss)."""
    seed: int = 20261124
    every: int = 50
    """Steps between log lines and checkpoints."""


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in stdlib.training_documents()), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents) -> tuple[torch.Tensor, int]:
    """Token stream [N] int64 with an end-of-text token after each document, and its UTF-8 bytes."""
    end, ids, size = tokenizer.token_to_id(END_OF_TEXT), [], 0
    for _, text in documents:
        ids += [*tokenizer.encode(text).ids, end]
        size += len(text.encode())
    return torch.tensor(ids), size


def build_model(recipe: Recipe) -> MiniMaxM2ForCausalLM:
    config = MiniMaxM2Config(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.expert_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        head_dim=recipe.hidden // recipe.heads,
        num_local_experts=recipe.experts,
        num_experts_per_tok=recipe.experts_per_token,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    config._experts_implementation = "grouped_mm"
    return MiniMaxM2ForCausalLM(config)


class RoutingCounter:
    """Counts the tokens of each expert and nudges the routing bias towards balance."""

    def __init__(self, model: MiniMaxM2ForCausalLM) -> None:
        self.blocks = [layer.mlp for layer in model.model.layers]
        self.counts = torch.zeros(len(self.blocks), self.blocks[0].gate.num_experts)
        for index, block in enumerate(self.blocks):
            block.gate.register_forward_hook(self._count(index))

    def _count(self, index: int):
        def hook(_module, _inputs, outputs) -> None:
            chosen = outputs[2].reshape(-1)
            self.counts[index] += torch.bincount(chosen, minlength=self.counts.shape[1])

        return hook

    def balance(self, rate: float) -> None:
        for block, load in zip(self.blocks, self.counts, strict=True):
            block.e_score_correction_bias += rate * torch.sign(load.mean() - load)

    def shares(self) -> torch.Tensor:
        """Share of routed tokens per expert, [layers, E], since the last reset."""
        return self.counts / self.counts.sum(dim=1, keepdim=True)

    def reset(self) -> None:
        self.counts.zero_()


def learning_rate(recipe: Recipe, step: int) -> float:
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_at(stream: torch.Tensor, recipe: Recipe, step: int) -> torch.Tensor:
    """The batch of a step, [B, L + 1], a function of (seed, step) alone."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - recipe.sequence - 1, (recipe.batch,), generator=generator)
    return torch.stack([stream[s : s + recipe.sequence + 1] for s in starts])


def loss_of(model, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token of a batch [B, L + 1], under bf16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1)
    )


@torch.no_grad()
def held_out_loss(model, stream: torch.Tensor, recipe: Recipe, sequences: int) -> float:
    """Mean nats per token of evenly spaced held-out sequences."""
    model.eval()
    last = len(stream) - recipe.sequence - 1
    starts = torch.linspace(0, last, sequences).long()
    total = 0.0
    for chunk in starts.split(recipe.batch):
        batch = torch.stack([stream[s : s + recipe.sequence + 1] for s in chunk])
        total += loss_of(model, batch).item() * len(chunk)
    model.train()
    return total / sequences


def optimizer_of(model, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def save_atomically(state: dict, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(recipe: Recipe, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(recipe)
    tokenizer.save(str(out / "tokenizer.json"))
    stream, train_bytes = encode(tokenizer, stdlib.training_documents())
    held_out, held_out_bytes = encode(tokenizer, stdlib.held_out_documents())
    bits_per_byte = len(held_out) / held_out_bytes / math.log(2)

    model = build_model(recipe)
    optimizer = optimizer_of(model, recipe)
    routing = RoutingCounter(model)
    step, elapsed, cpu_seconds = 0, 0.0, 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed, cpu_seconds = state["step"], state["elapsed"], state["cpu_seconds"]

    log = (out / "log.jsonl").open("a")
    if step == 0:
        header = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "train_tokens": len(stream),
            "train_bytes": train_bytes,
            "held_out_tokens": len(held_out),
            "held_out_bytes": held_out_bytes,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        print(json.dumps(header), file=log, flush=True)
    started, cpu_started = time.monotonic(), time.process_time()
    elapsed_before, cpu_before = elapsed, cpu_seconds
    while step < recipe.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = loss_of(model, batch_at(stream, recipe, step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        shares = routing.shares()
        routing.balance(recipe.balance_rate if step < 0.9 * recipe.steps else 0.0)
        routing.reset()
        if step % recipe.every == 0 or step == recipe.steps:
            nats = held_out_loss(model, held_out, recipe, 512 if step == recipe.steps else 64)
            routing.reset()
            elapsed = elapsed_before + time.monotonic() - started
            cpu_seconds = cpu_before + time.process_time() - cpu_started
            line = {
                "step": step,
                "tokens": step * recipe.batch * recipe.sequence,
                "train_nats": round(loss.item(), 4),
                "held_out_nats": round(nats, 4),
                "held_out_bits_per_byte": round(nats * bits_per_byte, 4),
                "gradient_norm": round(norm.item(), 3),
                "least_expert_share": round(shares.min().item(), 4),
                "wall_seconds": round(elapsed, 1),
                "cpu_seconds": round(cpu_seconds, 1),
            }
            print(json.dumps(line), file=log, flush=True)
            print(json.dumps(line), flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "elapsed": elapsed, "cpu_seconds": cpu_seconds}
            save_atomically(state, checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    train(Recipe(steps=arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
