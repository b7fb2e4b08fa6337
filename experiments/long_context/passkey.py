"""Write the passkey task: a number hidden at a depth of a long text, to be found again at its end.

    python -m experiments.long_context.passkey MODEL --tokens 2048 --out runs/passkey
    autoquant evaluate runs/mine --tasks $(ls runs/passkey/*.jsonl | paste -sd,) \
        --assignment "bf16,uniform nvfp4,winner"

One file of items for each depth, so that each is a task of its own. Text and question are those of
A. Mohtashami and M. Jaggi, Landmark Attention (arXiv:2305.16300, 2023). An item is right where
greedy decoding gives the whole number.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from autoquant.data.tokenizer import load_tokenizer

DEPTHS = (0, 25, 50, 75, 100)
"""Per cent of the filler before the number."""

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
KEY = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"


def items(depth: int, count: int, longest: int, size: Callable[[str], int], seed: int) -> Iterator:
    """Yield items whose prompts have as many tokens as fit `longest`.

    Args:
        depth: per cent of the filler before the number.
        count: of the items.
        longest: tokens of a prompt with its answer.
        size: tokens of a text.
        seed: of the numbers.
    """
    generator = random.Random(f"{seed}-{depth}")
    frame = size(TASK + KEY.format(key=99_999) + QUESTION + " 99999") + 8
    repeats = max(0, (longest - frame) // size(FILLER))
    for _ in range(count):
        key = generator.randint(10_000, 99_999)
        # The place varies within its depth, so that items differ in more than the number.
        before = min(repeats, max(0, round(repeats * depth / 100) + generator.randint(-1, 1)))
        parts = (TASK, FILLER * before, KEY.format(key=key), FILLER * (repeats - before), QUESTION)
        yield {"query": "".join(parts), "answer": str(key)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="its tokenizer counts")
    parser.add_argument("--tokens", type=int, default=2048, help="of the longest prompt")
    parser.add_argument("--items", type=int, default=50, help="for each depth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for depth in DEPTHS:
        found = items(
            depth,
            arguments.items,
            arguments.tokens,
            lambda text: len(tokenizer.encode(text)),
            arguments.seed,
        )
        file = arguments.out / f"passkey-{arguments.tokens}-depth-{depth}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in found), encoding="utf-8")
        print(file)


if __name__ == "__main__":
    main()
