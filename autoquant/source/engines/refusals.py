"""Which engines do not load quantized checkpoints of an architecture.

Engines' tables say what they lack. `refused.json` holds what only running an engine shows, with the
version that ran; a test holds it against `experiments/architectures/results`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
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
    without: str = ""
    """What makes a checkpoint that it loads, where that is known."""


def refusals(config: Mapping[str, Any], layouts: tuple[str, ...]) -> tuple[Refusal, ...]:
    """Engines that do not load what is made of a model, vLLM first.

    An engine without a class for the architecture is one of them; others were found by letting
    them load a checkpoint.

    Args:
        config: of the whole model.
        layouts: all that there are.
    """
    kind = config.get("model_type")
    own = architectures(config) or [name for name in [usual_architecture(kind)] if name]
    found = []
    for engine, has in engines().items():
        if own and has.isdisjoint(own):
            lacks = f"it has no model {own[0]} of its own"
            found.append(Refusal(engine=engine, layouts=layouts, why=lacks))
        found += [
            Refusal(engine=engine, layouts=tuple(entry["layouts"]), why=entry["why"])
            for entry in _refused()
            if (f"{entry['engine']} {entry['version']}", entry["model_type"]) == (engine, kind)
        ]
    return tuple(found)


@cache
def _refused() -> list[dict[str, Any]]:
    content: dict[str, Any] = json.loads(REFUSED.read_text(encoding="utf-8"))
    refused: list[dict[str, Any]] = content["refused"]
    return refused
