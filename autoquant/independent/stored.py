"""Weights of a checkpoint as its files and config.json say, dequantized in plain PyTorch.

ModelOpt's layout: `weight` (E4M3 codes, or two E2M1 codes a byte), `weight_scale`, for NVFP4 also
`weight_scale_2`, and `input_scale`. compressed-tensors': `weight_packed` and the reciprocals
`weight_global_scale` and `input_global_scale`. Other tools write FP8 with a scale for each row and
each token, and MXFP8, whose scales of 32 codes are exponents; both state in config.json alone how
inputs are rounded.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from autoquant.errors import SourceError

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Numbers of the 4-bit codes."""

BLOCK = 16
"""NVFP4 codes along K that share a scale."""

_PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale"),
    *("input_scale", "input_global_scale"),
)


@dataclass(frozen=True, slots=True)
class InputQuantizer:
    """How a linear's inputs are rounded before they are multiplied."""

    bits: int
    """4 for NVFP4, 8 for FP8 and MXFP8."""
    scale: float | None = None
    """Of FP8 inputs, or of the scales of NVFP4 blocks; None where inputs give their own."""
    block: int | None = None
    """Inputs along K that share a scale of their own; None where those of a token do."""


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """What a checkpoint says."""

    tensors: Mapping[str, Tensor]
    """Every tensor of the model by its name on disk, quantized ones in BF16."""
    inputs: Mapping[str, InputQuantizer]
    """Of each quantized linear, by its name; linears whose inputs stay in BF16 are absent."""
    quantized: frozenset[str]
    """Names of all quantized linears."""


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor that a folder's weight files hold, those of the index where there is one."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        with safe_open(folder / name, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


def read_stored(folder: Path) -> StoredModel:
    """Read and dequantize a checkpoint."""
    tensors = read_tensors(folder)
    modules: dict[str, dict[str, Tensor]] = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part in _PARTS:
            modules.setdefault(module, {})[part] = tensors[name]
    quantized = {module: parts for module, parts in modules.items() if "weight_scale" in parts}
    schemes = _schemes(folder)
    inputs: dict[str, InputQuantizer] = {}
    for module, parts in quantized.items():
        for part in parts:
            del tensors[f"{module}.{part}"]
        tensors[f"{module}.weight"] = _weight(parts)
        if (own := _input(parts) or _input_of_its_own(module, schemes)) is not None:
            inputs[module] = own
    caches = [name for name in tensors if name.endswith((".k_scale", ".v_scale"))]
    for name in caches:
        del tensors[name]
    return StoredModel(tensors=tensors, inputs=inputs, quantized=frozenset(quantized))


def _weight(parts: Mapping[str, Tensor]) -> Tensor:
    """Code times its scales in float32, rounded once to BF16, [N, K]."""
    scale = parts["weight_scale"]
    scale = torch.exp2(scale.float() - 127) if scale.dtype is torch.uint8 else scale.float()
    codes = parts.get("weight_packed", parts.get("weight"))
    assert codes is not None
    if codes.dtype is not torch.uint8:
        blocks = codes.float().unflatten(1, (scale.shape[1] if scale.ndim == 2 else 1, -1))
        weight: Tensor = (blocks * scale.unsqueeze(-1)).flatten(1)
        return weight.to(torch.bfloat16)
    if "weight_packed" in parts:
        scale = scale * (1 / parts["weight_global_scale"])
    else:
        scale = scale * parts["weight_scale_2"]
    numbers = E2M1[torch.stack([codes % 16, codes // 16], dim=-1).flatten(1).int()]
    blocks = numbers.view(len(numbers), -1, BLOCK) * scale.unsqueeze(-1)
    return blocks.flatten(1).to(torch.bfloat16)


def _input(parts: Mapping[str, Tensor]) -> InputQuantizer | None:
    if "input_global_scale" in parts:
        return InputQuantizer(4, 1 / parts["input_global_scale"].item())
    if "input_scale" in parts:
        is_fp8 = "weight_packed" not in parts and parts["weight"].dtype is not torch.uint8
        return InputQuantizer(8 if is_fp8 else 4, parts["input_scale"].item())
    return None


def _schemes(folder: Path) -> list[dict[str, Any]]:
    """What config.json declares of groups of linears; nothing where it declares none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return list(config.get("quantization_config", {}).get("config_groups", {}).values())


def _input_of_its_own(module: str, schemes: list[dict[str, Any]]) -> InputQuantizer | None:
    """How inputs are rounded by a scale that they give themselves, as FP8's and MXFP8's.

    Raises:
        SourceError: by a scale of another kind than one a token, or one for 32 inputs.
    """
    named = [own for own in schemes if any(_names(t, module) for t in own["targets"])]
    others = [own for own in schemes if "Linear" in own["targets"]]
    own = next(iter(named + others), {}).get("input_activations")
    if not own or own["dynamic"] is not True:
        return None
    kind = own["num_bits"], own["strategy"], own.get("group_size")
    if kind[:2] == (8, "token"):
        return InputQuantizer(8)
    if kind == (8, "group", 32):
        return InputQuantizer(8, block=32)
    raise SourceError(
        f"config.json rounds the inputs of {module} in a way that this does not know: {own}.",
        fix="pass a checkpoint in NVFP4, FP8 or MXFP8.",
    )


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module
