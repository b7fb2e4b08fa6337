"""Which groups rest on second moments of inputs, and what those take on a disk."""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from autoquant.decimals import gigabytes
from autoquant.errors import SourceError
from autoquant.formats import Choice
from autoquant.plan.linears import LayerGroup
from autoquant.source.names import ROUTED_EXPERT

PARTS = 2
"""Sequences that codes are fitted to, and sequences that are held out."""

MOST_BYTES_OF_A_SET = 1 << 30
"""Where the sums of all experts of a layer would take more, the layer's alone are kept: experts of
many channels see fewer tokens than channels, and lean on their layer in any case."""


def kept_matrices(experts: int | None, inputs: int) -> int:
    """How many matrices of one input set have sums of their own.

    Args:
        experts: that read the set; None for one weight.
        inputs: channels of it.
    """
    matrices = experts or 1
    return matrices if matrices * _bytes(inputs) <= MOST_BYTES_OF_A_SET else 1


def groups_with_moments(
    choices: Mapping[str, Collection[Choice]], groups: Collection[LayerGroup]
) -> tuple[LayerGroup, ...]:
    """The groups that some choice of theirs makes rest on moments of their inputs."""
    return tuple(
        group
        for group in groups
        if any(choice.format.needs_moments(choice) for choice in choices[group.name])
    )


def statistics_bytes(groups: Collection[LayerGroup]) -> int:
    """Bytes of the statistics of groups, each of whose codes rest on its inputs."""
    inputs: dict[str, int] = {}
    experts: dict[str, set[str]] = {}
    for group in groups:
        for linear in group.linears:
            inputs[linear.input_scale_set] = linear.in_features
            match = ROUTED_EXPERT.fullmatch(linear.name)
            if match is not None:
                experts.setdefault(linear.input_scale_set, set()).add(match["index"])
    return sum(
        _stored_matrices(len(experts.get(name, ())), size) * _bytes(size)
        for name, size in inputs.items()
    )


def _stored_matrices(experts: int, inputs: int) -> int:
    """Of one input set: one of a weight, or one of each expert and one of their layer."""
    kept = kept_matrices(experts or None, inputs)
    return 1 if kept < experts else kept + bool(experts)


def require_disk(folder: Path, groups: Collection[LayerGroup]) -> None:
    """Return if the disk has room for the statistics of groups, those in `folder` left out.

    Raises:
        SourceError: it has not.
    """
    there = folder
    while not there.exists():
        there = there.parent
    kept = sum(file.stat().st_size for file in folder.iterdir()) if there == folder else 0
    missing, free = statistics_bytes(groups) - kept, shutil.disk_usage(there).free
    if missing > free:
        raise SourceError(
            f"codes that are fitted to inputs need {gigabytes(missing)} of statistics in {folder}, "
            f"and its disk has {gigabytes(free)} left.",
            fix="--effort fast needs none of them, unless the space names such codes; or free "
            "space, or give --out on another disk.",
        )


def _bytes(inputs: int) -> int:
    """Of one matrix of products, float32, in both parts."""
    return PARTS * 4 * inputs**2
