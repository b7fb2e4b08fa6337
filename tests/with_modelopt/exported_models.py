"""Checkpoints as ModelOpt writes them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def exported_by_modelopt(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that ModelOpt's exporter stores; the model is of no use afterwards."""
    from modelopt.torch.export import export_hf_checkpoint

    export_hf_checkpoint(model, export_dir=folder)
    return load_tensors(folder)


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a checkpoint."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
