"""One architecture's table: what an engine joins, multiplies alone, and builds unquantized."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from autoquant.source import names
from experiments.engine_tables.construction import Builder
from experiments.engine_tables.loading import Loading, read_loading
from experiments.engine_tables.sources import Class, Wheel
from experiments.engine_tables.values import NONE, leaves

LAYER = re.compile(r"(?P<before>(?:.*?\.)?)(?:layers|h|blocks)\.\*\.(?P<rest>.+)")
"""A path inside the repeated blocks of a model; `*` is an index."""

CONVOLUTION = re.compile(r".*conv(1d)?")
OR = "|"
"""Between names on disk that fill the same part of a joined module."""


def table_of(wheel: Wheel, kind: Class, architectures: Mapping[str, Class]) -> dict[str, Any]:
    """What the class builds in the blocks of its language model, by paths inside a block."""
    builder = Builder(wheel, architectures)
    given: dict[str, set[object]] = {}
    experts: set[str] = set()
    for path, leaf in leaves(builder.build(kind)):
        match = LAYER.fullmatch(path)
        if match is None or _is_tower(match["before"]):
            continue
        rest = match["rest"]
        if not CONVOLUTION.fullmatch(rest.rpartition(".")[2]):
            given.setdefault(rest, set()).update(leaf.quantized)
            experts |= {rest} if leaf.leaf == "experts" else set()
    loading = read_loading(wheel, builder.visited)
    joined = {path: parts for path in sorted(given) if len(parts := _parts(path, loading)) > 1}
    return {
        "joined": joined,
        "alone": sorted(given.keys() - joined.keys() - experts),
        "experts": sorted(experts),
        "unquantized": sorted(path for path, values in given.items() if values == {NONE}),
        "renamed": _used(loading, given),
    }


def _is_tower(before: str) -> bool:
    patterns = [pattern for _, pattern in names.FIXED_COMPONENTS]
    return any(pattern.fullmatch(part) for part in before.split(".") for pattern in patterns)


def _parts(path: str, loading: Loading) -> list[str]:
    """Names on disk of the linears that the module at `path` holds, shard by shard."""
    shards: dict[str, dict[str, None]] = {}
    for ours, disk, shard in loading.stacked:
        own, part = _bare(ours), _bare(disk)
        if own != part and (path == own or path.endswith(f".{own}")):
            shards.setdefault(shard, {})[path.removesuffix(own) + part] = None
    if len(shards) > 1:
        return list(dict.fromkeys(OR.join(parts) for parts in shards.values()))
    parent, dot, last = path.rpartition(".")
    return [f"{parent}{dot}{part}" for part in loading.packed.get(last, [])]


def _bare(fragment: str) -> str:
    return fragment.strip(".").removesuffix(".weight")


def _used(loading: Loading, paths: Iterable[str]) -> dict[str, str]:
    """Renamings whose result is part of a module's path, and that join nothing."""
    dotted = [f".{path}." for path in paths]
    stacked = {_bare(disk) for _, disk, _ in loading.stacked}
    return {
        disk: ours
        for disk, ours in loading.renamed.items()
        if _bare(disk) not in stacked and ours.strip(".")
        if any(f".{ours.strip('.')}." in path for path in dotted)
    }
