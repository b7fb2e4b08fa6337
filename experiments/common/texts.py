"""Write the text that each subject is measured on.

    python -m experiments.common.texts --models ../shared/models --out runs/texts

The bundled reference model gets what it was held out from, the standard library's modules. Other
models get text sampled from themselves in BF16 at temperature 1: in-domain for any model, and as
long as one likes. Deterministic for one machine and version of torch.

Shapes: B sequences, V vocabulary.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from autoquant.data import stdlib
from autoquant.model.loading import LoadedModel, load_model

SAMPLED = {"babyllama": 4096, "stories260K": 1024}
"""Documents sampled from each model; each is at most as long as the model's positions."""

BATCH = 512


@torch.inference_mode()
def sample(loaded: LoadedModel, documents: int, seed: int) -> Iterator[str]:
    """Yield texts that the model writes after its beginning-of-sequence token."""
    torch.manual_seed(seed)
    tokenizer: Any = loaded.tokenizer
    for _ in range(documents // BATCH):
        ids = torch.full((BATCH, 1), tokenizer.bos_token_id)
        written = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_length=loaded.max_length,
            pad_token_id=tokenizer.eos_token_id,
            use_cache=True,
        )
        for row in written.tolist():
            yield tokenizer.decode(_until_end(row[1:], tokenizer), skip_special_tokens=True)


def _until_end(row: list[int], tokenizer: Any) -> list[int]:
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def write(path: Path, texts: Iterator[str]) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subjects", nargs="*", default=["reference", *SAMPLED])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.subjects:
        if name == "reference":
            texts = (text for _, text in stdlib.held_out_documents())
        else:
            loaded = load_model(arguments.models / name, torch.device("cpu"))
            texts = sample(loaded, SAMPLED[name], arguments.seed)
        write(arguments.out / f"{name}.jsonl", texts)


if __name__ == "__main__":
    main()
