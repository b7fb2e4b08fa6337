r"""KL of exported checkpoints as vLLM serves them, held against the KL that AutoQuant says.

    python -m experiments.served.run MODEL --text TEXT --vllm-python PYTHON \
        --vllm-check SCRIPT --out FILE

Each assignment is exported in both layouts. Export measures it on 16 sequences and keeps their KL
in `autoquant.json`; vLLM computes the same sequences of the source and of the checkpoint. Two BF16
runs, vLLM's and transformers' of the source, say what noise is. Dense models on a CPU: vLLM
emulates NVFP4 there, and its FP8 product is PyTorch's.

Shapes: S sequences, L tokens, V vocabulary.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner

from autoquant.cli import cli
from autoquant.formats import Choice
from autoquant.model.loading import load_model
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source
from experiments.common.record import provenance, write

FOLDER = Path(__file__).parent
ON_ANY_CPU = FOLDER.parent / "architectures" / "vllm_on_any_cpu.py"
LAYOUTS = ("modelopt", "compressed-tensors")
IN_TURN = ("nvfp4/mse", "fp8", "bf16")
ASSIGNMENTS = {"nvfp4/mse": ("nvfp4/mse",), "fp8": ("fp8",), "in turn": IN_TURN}
"""Choices that the groups take in turn, by what the table calls them."""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        served = _Served(options, Path(folder))
        rows = [row for name in options.assignments for row in served.rows(name)]
        result = {"model": options.model.name, "noise": served.noise, "rows": rows}
    write(options.out, result | provenance(None))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True, help="as --calibration takes it")
    parser.add_argument("--assignments", nargs="*", choices=ASSIGNMENTS, default=[*ASSIGNMENTS])
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("--vllm-check", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


class _Served:
    """A model with vLLM beside it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._source: np.ndarray[Any, Any] | None = None
        self.noise: dict[str, float] = {}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """What vLLM and AutoQuant say of an assignment in each layout."""
        return [self._row(name, layout) for layout in LAYOUTS]

    def _row(self, name: str, layout: str) -> dict[str, Any]:
        checkpoint = self._export(name, layout)
        said = json.loads((checkpoint / "autoquant.json").read_text())["forward"]
        tokens = np.array(said["sequences"], dtype=np.int64)
        if self._source is None:
            self._source = self._logits(self._options.model, tokens)
            ours = transformers_logits(self._options.model, tokens)
            self.noise = statistics(kl(self._source, ours))
        served = kl(self._source, self._logits(checkpoint, tokens))
        row = {
            "assignment": name,
            "layout": layout,
            "served": statistics(served),
            "said": statistics(np.array(said["kl"])),
            "difference": statistics(served - np.array(said["kl"])),
        }
        print(json.dumps(row), flush=True)
        return row

    def _export(self, name: str, layout: str) -> Path:
        every = find_groups(open_source(self._options.model))
        groups = [group for group in every if group.layer is not None]
        turns = ASSIGNMENTS[name]
        choices = {}
        for number, group in enumerate(groups):
            choice = Choice.parse(turns[number % len(turns)])
            choices[group.name] = str(choice) if group.why_not(choice) is None else "bf16"
        file = self._folder / "assignment.json"
        file.write_text(json.dumps({"schema_version": 1, "groups": choices}))
        out = self._folder / f"{name.replace('/', '-')}-{layout}"
        flags = ("--assignment", file, "--layout", layout, "--calibration", self._options.text)
        arguments = ("export", self._options.model, *flags, "--out", out)
        done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        if done.exit_code:
            raise SystemExit(done.stderr)
        return out

    def _logits(self, checkpoint: Path, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """vLLM's, float32 [S, L, V]."""
        given, found = self._folder / "tokens.npy", self._folder / "logits.npy"
        np.save(given, tokens)
        script = FOLDER / "vllm_logits.py"
        command = [self._options.vllm_python, ON_ANY_CPU, script, self._options.vllm_check]
        subprocess.run(
            [*command, checkpoint.absolute(), given, found], check=True, stdout=subprocess.DEVNULL
        )
        logits: np.ndarray[Any, Any] = np.load(found)
        return logits


@torch.inference_mode()
def transformers_logits(model: Path, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Logits of the source in BF16, float32 [S, L, V]."""
    loaded = load_model(model, torch.device("cpu")).model
    rows = (loaded(input_ids=torch.from_numpy(row)[None], use_cache=False) for row in tokens)
    return np.stack([found.logits[0].float().numpy() for found in rows])


def kl(reference: np.ndarray[Any, Any], logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mean KL(reference || logits) of each sequence, nats per token: float64 [S]."""
    found = []
    for one, other in zip(reference, logits, strict=True):
        p, q = (torch.from_numpy(own).double().log_softmax(-1) for own in (one, other))
        found.append((p.exp() * (p - q)).sum(-1).mean().item())
    return np.array(found)


def statistics(values: np.ndarray[Any, Any]) -> Mapping[str, float]:
    """Mean and standard error over sequences."""
    return {"mean": values.mean(), "stderr": values.std(ddof=1) / len(values) ** 0.5}


if __name__ == "__main__":
    main()
