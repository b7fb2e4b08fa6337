"""Which engines do not load quantized checkpoints of an architecture.

Engines' tables say what they lack. `refused.json` holds what only running an engine shows, with the
version that ran; a test holds it against `experiments/architectures/results`.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from autoquant.source.engines.tables import architectures, engines, usual_architecture

REFUSED = Path(__file__).with_name("refused.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An engine that does not load quantized checkpoints of an architecture."""

    engine: str
    """With its version."""
    layouts: tuple[str, ...]
    """Those that it does not load."""
    why: str
    """What it does or lacks: `it has no model ...`."""
    linears: str = "*"
    """Names of the linears that it does not load quantized, with wildcards."""
    formats: tuple[str, ...] | None = None
    """Formats that it does not load them in; None for any but BF16."""
    without: str = ""
    """What makes a checkpoint that it loads, where that is known."""

    def concerns(self, linear: str, formats: Collection[str]) -> bool:
        """Whether a linear is one of those, in one of these formats."""
        closed = formats if self.formats is None else {*self.formats}.intersection(formats)
        return bool(closed) and fnmatchcase(linear, self.linears)


def refusals(config: Mapping[str, Any], layouts: tuple[str, ...]) -> tuple[Refusal, ...]:
    """Engines that do not load what is made of a model, vLLM first.

    An engine without a class for the architecture is one of them; others were found by letting
    them load a checkpoint.

    Args:
        config: of the whole model.
        layouts: all that there are.
    """
    kind = config.get("model_type")
    named = architectures(config) or [name for name in [usual_architecture(kind)] if name]
    found = []
    for engine, has in engines().items():
        if named and has.isdisjoint(named):
            lacks = f"it has no model {named[0]} of its own"
            found.append(Refusal(engine=engine, layouts=layouts, why=lacks))
        found += [own for own_kind, own in _refused() if (own_kind, own.engine) == (kind, engine)]
    return tuple(found)


@cache
def _refused() -> list[tuple[str, Refusal]]:
    """What running engines has shown, with the model type of each."""
    content = json.loads(REFUSED.read_text(encoding="utf-8"))
    return [(entry["model_type"], _refusal(entry)) for entry in content["refused"]]


def _refusal(entry: Mapping[str, Any]) -> Refusal:
    return Refusal(
        engine=f"{entry['engine']} {entry['version']}",
        layouts=tuple(entry["layouts"]),
        why=entry["why"],
        linears=entry.get("linears", "*"),
        formats=tuple(entry["formats"]) if "formats" in entry else None,
        without=entry.get("without", ""),
    )
