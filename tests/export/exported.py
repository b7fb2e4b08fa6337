"""Models exported under assignments that mix every format."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from autoquant.export.export import ExportResult, export
from autoquant.formats import BF16, FP8, NVFP4, PLAIN_RULES, Choice
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import Groups, find_groups
from autoquant.source.shards import read_checkpoint_headers
from autoquant.source.source import Source

NVFP4_MAX, NVFP4_MSE, NVFP4_46 = (Choice(NVFP4.format, rule) for rule in PLAIN_RULES)


def mixed(groups: Groups) -> Assignment:
    """Every format and scale rule in turn, experts in NVFP4 and FP8; BF16 where one is illegal."""
    cycle = itertools.cycle((NVFP4_MSE, FP8, BF16, NVFP4_46, NVFP4_MAX))
    choices = {group.name: next(cycle) for group in groups}
    return Assignment.of(
        {
            name: BF16 if groups[name].why_illegal(choice.format) else choice
            for name, choice in choices.items()
        }
    )


def uniform(groups: Groups, choice: Choice) -> Assignment:
    return Assignment.of({group.name: choice for group in groups if group.role != "head"})


def input_amax(groups: Groups) -> dict[str, float]:
    """A different magnitude for every input set."""
    names = dict.fromkeys(linear.input_scale_set for linear in groups.linears)
    return {name: 1.0 + number / 7 for number, name in enumerate(names)}


def export_mixed(source: Source, target: Path) -> ExportResult:
    groups = find_groups(source)
    return export(source, groups, mixed(groups), input_amax(groups), target)


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor, read by the safetensors library."""
    files = read_checkpoint_headers(folder).files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def change_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Iterable[str] | None]
) -> None:
    """Rewrite the single weight file of `folder` after `change`."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
