"""What serving engines build of an architecture: their own modules, read from their sources.

`engines.json` is made by `python -m experiments.engine_tables.make`. Names in it are paths inside a
decoder block, such as `self_attn.qkv_proj`.
"""

import itertools
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("engines.json")

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a path that counts; `*` in the tables."""

_OR = "|"
"""Between the names on disk that fill one part of a joined module."""


@dataclass(frozen=True, slots=True)
class Joined:
    """Linears of a block that an engine multiplies as one matrix."""

    path: str
    """What the engine calls the matrix."""
    parts: tuple[str, ...]
    """Names on disk of those that are there, in their order in the matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTable:
    """One engine's modules in the blocks of one architecture."""

    engine: str
    """With its version: `vLLM 0.33.0`."""
    joined: Mapping[str, tuple[tuple[str, ...], ...]] = field(repr=False)
    """Names on disk by the joined module; those that stand for the same part together."""
    unquantized: frozenset[str] = field(repr=False)
    """Modules that are built without a quantization, so that only BF16 loads into them."""
    renamed: Mapping[str, str] = field(repr=False)
    """Parts of names on disk, and what the engine calls them."""
    _known: frozenset[str] = field(repr=False)

    @classmethod
    def of(cls, engine: str, table: Mapping[str, Any]) -> "EngineTable":
        """The table as engines.json holds it."""
        joined = {
            path: tuple(tuple(part.split(_OR)) for part in parts)
            for path, parts in table["joined"].items()
        }
        on_disk = (name for parts in joined.values() for part in parts for name in part)
        return cls(
            engine=engine,
            joined=joined,
            unquantized=frozenset(table["unquantized"]),
            renamed=table["renamed"],
            _known=frozenset([*table["alone"], *table["experts"], *joined, *on_disk]),
        )

    def module(self, name: str) -> str | None:
        """The engine's own name of a linear or of a container of experts; None if it has none."""
        name = _INDEX.sub("*", name)
        if name in self._known:
            return name
        spelled = f".{name}."
        for disk, ours in self.renamed.items():
            spelled = spelled.replace(disk, ours, 1)
            if spelled.strip(".") in self._known:
                return spelled.strip(".")
        return None

    def joined_in(self, block: Collection[str]) -> list[Joined]:
        """Matrices that hold two or more of a block's linears, the largest first.

        A matrix of which less than half is there belongs to another kind of block.
        """
        spelled: dict[tuple[str, ...], dict[str, str]] = {}
        for name in block:
            if (module := self.module(name)) is not None:
                spelled.setdefault(tuple(_INDEX.findall(name)), {})[name] = module
        found = []
        for (path, parts), modules in itertools.product(self.joined.items(), spelled.values()):
            there = [[n for n, module in modules.items() if module in part] for part in parts]
            filled = sum(map(bool, there))
            if filled > 1 and 2 * filled >= len(parts):
                found.append(Joined(path, tuple(name for names in there for name in names)))
        return sorted(found, key=lambda joined: -len(joined.parts))

    def unquantized_in(self, block: Collection[str]) -> frozenset[str]:
        """The block's linears, and containers of experts, that go into unquantized modules."""
        modules = {name: self.module(name) for name in block}
        for joined in reversed(self.joined_in(block)):
            modules |= dict.fromkeys(joined.parts, joined.path)
        return frozenset(name for name, module in modules.items() if module in self.unquantized)


def engine_tables(
    config: Mapping[str, Any], text_config: Mapping[str, Any]
) -> tuple[EngineTable, ...]:
    """The tables of every engine that knows the architecture, vLLM's first.

    Args:
        config: of the whole model.
        text_config: of its language model.
    """
    content = _content()
    names = [name for part in (config, text_config) for name in architectures(part)]
    kinds = [part.get("model_type") for part in (config, text_config)]
    names += [own for kind in kinds if (own := content["model_types"].get(kind)) is not None]
    found = (_table(engine, name) for engine in content["engines"] for name in names)
    first: dict[str, EngineTable] = {}
    for table in found:
        if table is not None:
            first.setdefault(table.engine, table)
    return tuple(first.values())


def engines() -> dict[str, frozenset[str]]:
    """The architectures that each engine has, by its name with the version."""
    return {
        f"{engine} {own['version']}": frozenset([*own["architectures"], *own["without_table"]])
        for engine, own in _content()["engines"].items()
    }


def usual_architecture(model_type: object) -> str | None:
    """The architecture that transformers makes of a model type, if an engine has it."""
    own: str | None = _content()["model_types"].get(model_type)
    return own


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Those that a config names."""
    named = config.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


@cache
def _table(engine: str, architecture: str) -> EngineTable | None:
    content = _content()["engines"][engine]
    table = content["architectures"].get(architecture)
    if isinstance(table, str):
        table = content["architectures"][table]
    return EngineTable.of(f"{engine} {content['version']}", table) if table else None
