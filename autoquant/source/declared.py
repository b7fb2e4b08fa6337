"""What the files of a model folder say of its quantization, if they say anything."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoquant.source.json_file import read_json_object

QUANTIZATION = "quantization_config"

KEYS = (QUANTIZATION, "compression_config")
"""Of config.json or of a part of it."""

FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Of ModelOpt, AutoGPTQ and AutoAWQ, where config.json says nothing."""

OWN_FILE = "autoquant.json"
"""Of our own exports, which are no sources."""

READ_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "mxfp8")
"""What publishers call the forms that are read. ModelOpt's checkpoints are made from BF16 ones."""


_FRONT_MATTER = 1 << 16
"""Characters of a model card that are looked at."""

_BASE_MODEL = re.compile(
    r"^base_model:\s*(?:-\s*)?[\"']?(?P<id>[\w.-]+/[\w.-]+)[\"']?\s*$", re.MULTILINE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """One declaration."""

    where: str
    """`quantization_config`, `text_config.quantization_config`, `hf_quant_config.json`."""
    is_published: bool
    """Whether the model's publisher declares it where transformers and engines look for it."""
    content: Mapping[str, Any] = field(repr=False)

    @property
    def method(self) -> str:
        """What it calls itself: `fp8`, `modelopt`, `compressed-tensors`, `awq`, ..."""
        inner = self.content.get("quantization")
        named = inner.get("quant_algo") if isinstance(inner, dict) else None
        return str(self.content.get("quant_method") or named or "no method named")

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale, where the declaration says so."""
        match self.content.get("weight_block_size"):
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                return rows, columns
        return None

    @property
    def scales_are_powers(self) -> bool:
        """Whether scales are powers of two in whatever dtype (`ue8m0`: DeepSeek-V3.1 and V3.2)."""
        return self.content.get("scale_fmt") == "ue8m0"

    @property
    def is_read(self) -> bool:
        """Whether codes may stand for the weights that the model was published with."""
        return self.is_published and self.method in READ_METHODS

    def __str__(self) -> str:
        return f"{self.where}: {self.method}"


def find_declared(folder: Path, config: Mapping[str, Any]) -> Declared | None:
    """The first declaration of a folder, that of config.json before those of other files.

    Raises:
        SourceError: a file with a declaration cannot be read.
    """
    for place, content in _in_config(config, ""):
        is_ours = (folder / OWN_FILE).is_file()
        where = f"{place} beside {OWN_FILE}" if is_ours else place
        return Declared(where=where, is_published=not is_ours, content=content)
    for name in FILES:
        if (folder / name).is_file():
            content = read_json_object(folder / name)
            return Declared(where=name, is_published=False, content=content)
    return None


def base_model(folder: Path) -> str | None:
    """The hub id of the model that this one was made from, where its model card names it."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as text:
        front = text.read(_FRONT_MATTER)
    found = _BASE_MODEL.search(front) if front.startswith("---") else None
    return found["id"] if found else None


def _in_config(config: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key in KEYS:
        if config.get(key) is not None:
            value = config[key]
            yield path + key, value if isinstance(value, dict) else {"quant_method": value}
    for key, value in config.items():
        if isinstance(value, dict) and key not in KEYS:
            yield from _in_config(value, f"{path}{key}.")


def without_declaration(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says nothing of a quantization, in any of its parts."""
    return {
        key: without_declaration(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in KEYS
    }
