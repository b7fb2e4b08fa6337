"""KL of checkpoints, whoever wrote them, by one judge on the same fresh tokens.

    python -m experiments.evidence.judge MODEL --text TEXT --budget-bpe 5.0 --mode w4a4 \
        --ours runs/smollm2-5.0 --peers runs/peers/prismaquant-5.0 runs/peers/autoround-5.0 \
        --out experiments/evidence/results/judged-smollm2-w4a4-5.0.json

The judge is transformers' own model on dequantized weights, with inputs rounded as each checkpoint
declares them: code that shares nothing with what scored ours, nor with a peer. The tokens are those
of `experiments.vs_modelopt.presets`: the report side of the text, behind what a search reports on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoquant.data.text import load_corpus
from autoquant.data.tokenizer import load_tokenizer
from autoquant.data.tokens import Split, TokenPlan
from autoquant.independent.forward import Evidence, OwnModel, token_kl
from autoquant.independent.stored import read_tensors
from autoquant.measure.kl import TokenKl
from autoquant.report.record import RunRecord
from experiments.common import record
from experiments.common.bench import fresh_split
from experiments.evidence import peers
from experiments.vs_modelopt.run import difference


def main() -> None:
    arguments = _arguments()
    plan = _plan(arguments)
    split = _fresh(arguments, plan)
    found = _judged(arguments, split)
    rows = {
        folder: _size(folder) | {"kl": kl.mean, "stderr": kl.stderr()}
        for folder, kl in found.items()
    }
    best = min((found[folder] for folder in arguments.peers), key=lambda kl: kl.mean)
    rows[arguments.ours]["to_best_peer"] = difference(found[arguments.ours], best)
    result = record.provenance(arguments.commit) | {
        "subject": f"{arguments.model.name}, judged",
        "seed": plan.seed,
        "mode": arguments.mode,
        "tokens": {"fresh": split.tokens},
        "documents": len(np.unique(np.concatenate(split.units))),
        "cells": [
            {
                "budget_bpe": arguments.budget_bpe,
                "modelopt": {},
                "peers": {rows[own].pop("who"): rows[own] for own in arguments.peers},
                "autoquant": rows[arguments.ours],
            }
        ],
    }
    record.write(arguments.out, result)
    print(json.dumps(result["cells"], indent=1))


def _plan(arguments: argparse.Namespace) -> TokenPlan:
    """How our search cut the text.

    Raises:
        SystemExit: a peer was given text that was cut in another way, so that it may have seen what
            is judged.
    """
    ours = RunRecord.read(arguments.ours).settings
    names = ("calibration", "search", "report")
    counts = {name: ours[f"{name}_tokens"] for name in names}
    plan = TokenPlan(**counts, sequence_length=ours["sequence_length"], seed=ours["seed"])
    for folder in arguments.peers:
        theirs = peers.load(folder)["settings"]
        if (theirs["sequence_length"], theirs["seed"]) != (plan.sequence_length, plan.seed):
            raise SystemExit(f"{folder} was given text in another cut than {arguments.ours} was")
    return plan


def _fresh(arguments: argparse.Namespace, plan: TokenPlan) -> Split:
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=False)
    corpus = load_corpus(str(arguments.text))
    return fresh_split(corpus, tokenizer, plan, arguments.fresh_tokens)


@torch.inference_mode()
def _judged(arguments: argparse.Namespace, split: Split) -> dict[Path, TokenKl]:
    """KL of each folder's checkpoint: all models stay on the device, sequences go by."""
    device = torch.device(arguments.device)
    rounds = Evidence(sequences=(), kl=(), activation_mode=arguments.mode, kv_cache="bf16").rounds
    source = OwnModel.of_source(arguments.model, device)
    tensors = read_tensors(arguments.model)
    models = {
        folder: OwnModel.of_checkpoint(folder / peers.CHECKPOINT, tensors, rounds, device)
        for folder in (arguments.ours, *arguments.peers)
    }
    rows = [row for batch in split.batches for row in batch]
    kl: dict[Path, list[Any]] = {folder: [] for folder in models}
    for row in rows:
        reference = source.log_probabilities(row)
        for folder, model in models.items():
            kl[folder].append(token_kl(reference, model.log_probabilities(row)).cpu().numpy())
    for folder, model in models.items():
        if unused := model.unused():
            raise SystemExit(f"{folder}: no product was seen of {', '.join(unused)}")
    return {
        folder: TokenKl(
            kl=np.concatenate(own),
            sequence=np.repeat(np.arange(len(rows)), [len(row) for row in rows]),
            unit=np.concatenate(split.units),
        )
        for folder, own in kl.items()
    }


def _size(folder: Path) -> dict[str, Any]:
    """Bytes by the checkpoint's files, and what it took to make."""
    size = {"checkpoint_bytes": peers.tensor_bytes(folder / peers.CHECKPOINT)}
    if (folder / peers.MADE).exists():
        made = peers.load(folder)
        kept = ("who", "packages", "seconds", "host_bytes", "device_bytes", "settings")
        return size | {name: made[name] for name in kept}
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return size | {"seconds": result["seconds"]["total"], "said": result["kl"]["mean"]}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="as `autoquant --calibration`")
    parser.add_argument("--budget-bpe", type=float, required=True, help="of the searched layers")
    parser.add_argument("--mode", choices=["w4a4", "w4a16"], default="w4a4")
    parser.add_argument("--ours", type=Path, required=True, help="a run directory")
    parser.add_argument("--peers", type=Path, nargs="+", required=True, help="what they wrote")
    parser.add_argument("--fresh-tokens", type=int, default=65_536)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--commit", default=None, help="of the code, where git cannot tell")
    return parser.parse_args()


if __name__ == "__main__":
    main()
