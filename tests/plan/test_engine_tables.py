"""Our groups held against what vLLM and SGLang build, for every architecture in common.

The tables are read here a second time, without the package's own reader.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from common_architectures import NEEDS_MORE, TRANSPOSED, built, common_kinds, engine_table

from autoquant.errors import SourceError
from autoquant.plan.grouping import Groups, find_groups, group_tensors
from autoquant.source.engines.tables import FILE
from autoquant.source.headers import TensorHeader

IN_BLOCK = re.compile(r"(.*?(?:layers|h|blocks)\.\d+)\.(.+)")
EXPERT = re.compile(r".+\.experts\.\d+\..+")
INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


class EngineBlocks:
    """A model's linears as an engine's table spells them, block by block."""

    def __init__(self, names: list[str], table: dict[str, Any]) -> None:
        self.table = table
        parts = [part for own in table["joined"].values() for part in own]
        disk = {name for part in parts for name in part.split("|")}
        self.known = disk | {*table["alone"], *table["joined"]}
        self.blocks: dict[Any, dict[str, str]] = defaultdict(dict)
        for name in names:
            match = IN_BLOCK.fullmatch(name)
            if match and not EXPERT.fullmatch(name):
                place = (match[1], *INDEX.findall(match[2]))
                self.blocks[place][self.spelled(match[2])] = name

    def spelled(self, rest: str) -> str:
        rest = INDEX.sub("*", rest)
        tried = [rest]
        for disk, ours in self.table["renamed"].items():
            tried.append(f".{tried[-1]}.".replace(disk, ours, 1).strip("."))
        return next((name for name in tried if name in self.known), rest)

    def joined(self) -> Iterator[tuple[str, list[str]]]:
        """Path of a matrix, and the names on disk of its linears that are there."""
        for linears in self.blocks.values():
            for path, parts in self.table["joined"].items():
                there = [[linears[p] for p in part.split("|") if p in linears] for part in parts]
                filled = [names for names in there if names]
                if len(filled) > 1 and len(filled) >= len(parts) / 2:
                    yield path, [name for names in filled for name in names]

    def unquantized(self) -> Iterator[str]:
        joined = {name: path for path, names in self.joined() for name in names}
        for linears in self.blocks.values():
            for spelled, name in linears.items():
                if joined.get(name, spelled) in self.table["unquantized"]:
                    yield name

    def knows(self, name: str) -> bool:
        return self.spelled(IN_BLOCK.fullmatch(name)[2]) in self.known


def differences(groups: Groups, engines: list[EngineBlocks]) -> Iterator[str]:
    """Where groups are not what vLLM, the first engine, loads, or join what no engine joins."""
    vllm = engines[0]
    group_of = {linear.name: group for group in groups for linear in group.linears}
    scale_of = {linear.name: linear.weight_scale_set for linear in groups.linears}
    for path, members in vllm.joined():
        if len({scale_of.get(name) for name in members}) > 1:
            yield f"{path} is one matrix in vLLM, and {members} do not share a scale"
    for name in vllm.unquantized():
        if name in group_of and not group_of[name].closed:
            yield f"vLLM builds {name} without a quantization, and it is open"
    sets: dict[str, set[str]] = defaultdict(set)
    for name, scale in scale_of.items():
        if IN_BLOCK.fullmatch(name) and not EXPERT.fullmatch(name) and vllm.knows(name):
            sets[scale].add(name)
    matrices = [set(members) for engine in engines for _, members in engine.joined()]
    for members in sets.values():
        if not _are_joined(members, matrices):
            yield f"no engine joins {sorted(members)}"


def _are_joined(members: set[str], matrices: list[set[str]]) -> bool:
    """Whether matrices that overlap lead from one member to every other."""
    reached = {min(members)}
    for _ in members:
        for matrix in matrices:
            if matrix & reached:
                reached |= matrix & members
    return reached == members


def blocks_of(table: dict[str, Any]) -> dict[str, list[str]]:
    """Linears on disk of each matrix of a table, by its path."""
    joined = {
        path: [part.partition("|")[0] for part in parts] for path, parts in table["joined"].items()
    }
    return joined | {path: [path] for path in table["alone"]}


@pytest.mark.parametrize("engine", ["vLLM", "SGLang"])
def test_groups_follow_every_table_of_an_engine(engine):
    """A layer for each matrix of each architecture, also of those that transformers lacks."""
    architectures = json.loads(FILE.read_text())["engines"][engine]["architectures"]
    first = json.loads(FILE.read_text())["engines"]["vLLM"]["architectures"]
    walked, found = 0, []
    for architecture in architectures:
        if engine != "vLLM" and architecture in first:
            continue
        table = engine_table(engine, architecture)
        matrices = list(blocks_of(table).items())
        names = {
            number: [f"model.layers.{number}.{part.replace('*', '0')}" for part in parts]
            for number, (_, parts) in enumerate(matrices)
        }
        headers = [header(f"{name}.weight") for own in names.values() for name in own]
        config = {"architectures": [architecture]}
        groups = group_tensors({h.name: h for h in headers}, config, config)
        group_of = {linear.name: group for group in groups for linear in group.linears}
        walked += len(matrices)
        for number, (path, _) in enumerate(matrices):
            held = {group_of[name].name for name in names[number] if name in group_of}
            is_open = any(not group_of[name].closed for name in names[number] if name in group_of)
            if len(held) > 1:
                found.append(f"{architecture}: {path} is {sorted(held)}")
            if path in table["unquantized"] and is_open:
                found.append(f"{architecture}: {path} is open")
    assert found == []
    assert walked > (1500 if engine == "vLLM" else 500)


def header(name: str) -> TensorHeader:
    return TensorHeader(
        name=name, dtype="BF16", shape=(64, 64), file=Path("x"), begin=0, end=2 * 64 * 64
    )


@pytest.mark.slow
def test_groups_of_every_common_architecture_are_what_vllm_builds(tmp_path, capsys):
    kinds = [(kind, own) for kind, own in common_kinds() if kind not in NEEDS_MORE]
    compared, found = 0, []
    for kind, architecture in kinds:
        source = built(kind, architecture, tmp_path / kind)
        if kind in TRANSPOSED:
            with pytest.raises(SourceError, match="Conv1D"):
                find_groups(source)
            continue
        groups = find_groups(source)
        names = [n.removesuffix(".weight") for n in source.headers.tensors if n.endswith(".weight")]
        tables = [t for e in ("vLLM", "SGLang") if (t := engine_table(e, architecture))]
        engines = [EngineBlocks(names, table) for table in tables]
        compared += len(groups)
        found += [f"{kind}: {line}" for line in differences(groups, engines)]
    with capsys.disabled():
        print(
            f"\n{len(kinds)} architectures of transformers and vLLM walked, {compared} groups, "
            f"{len(found)} differ from vLLM's table; not built: {NEEDS_MORE}; "
            f"without groups, since their matrices are transposed: {', '.join(TRANSPOSED)}"
        )
    assert found == [], "\n".join(found)
    assert len(kinds) > 80
    assert compared > 2000
