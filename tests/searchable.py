"""Tiny models with a tokenizer and a text: everything that a search needs, made in the test."""

import random
from pathlib import Path
from typing import Any

from tiny_models import save_model

VOCABULARY = 272
"""Three special tokens, 256 bytes, and the rest unused."""

WORDS = (
    "scale",
    "block",
    "weight",
    "format",
    "layer",
    "expert",
    "router",
    "head",
    "token",
    "rounds",
)

WITH_EXPERTS = ("qwen3_moe", "mixtral", "minimax_m2")

TOKEN_FLAGS = (
    *("--calibration-tokens", 256),
    *("--search-tokens", 512),
    *("--report-tokens", 1024),
    *("--sequence-length", 32),
    *("--batch-tokens", 256),
)


def save_searchable(kind: str, folder: Path, **changes: Any) -> Path:
    """The model `kind` with weights large enough that quantization is more than noise."""
    settings: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.12}
    if kind in WITH_EXPERTS:
        settings["num_experts_per_tok"] = 2
    save_model(kind, folder, **(settings | changes))
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, *, bos: bool = False) -> None:
    """A tokenizer of single bytes; with `bos`, one that begins a text with token 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def save_text(folder: Path, *, documents: int = 30, words: int = 180, seed: int = 0) -> Path:
    """A folder of text files, of about a thousand bytes each unless told how many words."""
    folder.mkdir(parents=True)
    generator = random.Random(seed)
    for number in range(documents):
        text = " ".join(generator.choice(WORDS) for _ in range(words))
        (folder / f"{number:03d}.txt").write_text(text)
    return folder
