"""The model card: what the checkpoint is, how far it is from its base model, how to serve it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from autoquant.export.declaration import caveat
from autoquant.export.layouts.base import Layout
from autoquant.formats import BF16, Choice
from autoquant.formats.kv_cache import KvCache
from autoquant.parsing import Unreadable, parse_yaml, read_text
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import Groups
from autoquant.plan.plan import refused_by
from autoquant.source.names import ROLES
from autoquant.source.source import Source

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


@dataclass(frozen=True, slots=True, kw_only=True)
class KlRow:
    """One line of the card's KL table."""

    name: str
    bpe: float
    """Bits per element, scope `checkpoint`."""
    kl: float
    """Mean KL to the BF16 model, nats per token."""
    stderr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What the card says that the checkpoint itself does not show."""

    command: str
    """The exact command line that made the checkpoint."""
    budget_bpe: float | None = None
    budget_scope: str = "checkpoint"
    budget_unit: str = "bits per element"
    """What the budget counts: bits of which kind, of which layers."""
    budgeted_bpe: float | None = None
    """What the checkpoint takes in that unit, where it is not what it stores."""
    further_limits: tuple[str, ...] = ()
    """Limits besides the budget, and what the checkpoint takes of each, in words."""
    target: str
    """The machine whose inputs were measured; a KL without it means nothing."""
    kv_cache: str = "bf16"
    """Of the model that was measured."""
    text: str
    """The text that KL was measured on."""
    tokens: int
    rows: tuple[KlRow, ...]
    """This checkpoint first, then the baselines on the same tokens."""
    base_model: str | None = None
    """Hub id, where the source folder does not tell it."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "command": self.command,
            "budget_bpe": self.budget_bpe,
            "budget_scope": self.budget_scope,
            "budget_unit": self.budget_unit,
            "budgeted_bpe": self.budgeted_bpe,
            "further_limits": list(self.further_limits),
            "target": self.target,
            "kv_cache": self.kv_cache,
            "text": self.text,
            "tokens": self.tokens,
            "kl": [
                {"name": row.name, "bpe": row.bpe, "kl": row.kl, "stderr": row.stderr}
                for row in self.rows
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """How the checkpoint is read."""

    layout: Layout
    choices: Mapping[str, Choice]
    """Choice of every quantized linear, by its name on disk."""
    kv_cache: KvCache


def model_card(
    source: Source,
    groups: Groups,
    assignment: Assignment,
    bpe: float,
    served: Served,
    card: CardFacts | None,
) -> str:
    """README.md of the checkpoint, Markdown with the hub's YAML front matter."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("autoquant.export", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    base = (card.base_model if card else None) or source.hub_id
    refused = refused_by(source.config, groups, assignment.quantized)
    return environment.get_template("card.md.j2").render(
        front_matter=yaml.safe_dump(
            _front_matter(source, assignment, base), sort_keys=False, allow_unicode=True
        ),
        name=base or Path(source.model).resolve().name,
        base=base,
        bpe=bpe,
        served=served,
        caveat=caveat(served.layout, groups, served.choices),
        refused=[own for own in refused if served.layout in own.layouts],
        card=card,
        counts=_counts_by_role(groups, assignment),
        layers=_layer_map(groups, assignment),
        roles=_roles(groups),
        formats=[form.upper() for form in _forms(assignment)],
    )


def _front_matter(source: Source, assignment: Assignment, base: str | None) -> dict[str, Any]:
    inherited = _source_front_matter(source)
    matter: dict[str, Any] = {key: inherited[key] for key in _INHERITED if key in inherited}
    matter.setdefault("pipeline_tag", "text-generation")
    if base is not None:
        matter |= {"base_model": base, "base_model_relation": "quantized"}
    used = [format for format, count in assignment.counts().items() if count]
    tags = ["autoquant", "mixed-precision", *(f.replace("/", "-") for f in used if f != BF16.form)]
    return matter | {"tags": tags}


def _source_front_matter(source: Source) -> Mapping[str, Any]:
    """The front matter of the source's own card; empty where there is none to read."""
    try:
        text = read_text(source.path / "README.md")
        if not text.startswith("---\n"):
            return {}
        matter = parse_yaml(text.split("\n---", 1)[0].removeprefix("---\n"))
    except (OSError, Unreadable):
        return {}
    return matter if isinstance(matter, dict) else {}


def _roles(groups: Groups) -> list[str]:
    present = {group.role for group in groups}
    return [role for role in ROLES if role in present]


def _counts_by_role(groups: Groups, assignment: Assignment) -> dict[str, list[int]]:
    """Groups per format of every role."""
    counts: dict[str, Counter[str]] = {role: Counter() for role in _roles(groups)}
    for group in groups:
        counts[group.role][assignment[group.name].form] += 1
    forms = _forms(assignment)
    return {role: [counter[form] for form in forms] for role, counter in counts.items()}


def _forms(assignment: Assignment) -> list[str]:
    """Every format, and with BF16 inputs those that occur so."""
    return list(assignment.counts())


def _layer_map(groups: Groups, assignment: Assignment) -> dict[str, list[str]]:
    """The choices of every layer, one cell per role."""
    roles = _roles(groups)
    layers: dict[str, list[list[str]]] = {}
    for group in groups:
        layer = "-" if group.layer is None else str(group.layer)
        cells = layers.setdefault(layer, [[] for _ in roles])
        cells[roles.index(group.role)].append(str(assignment[group.name]))
    return {layer: [", ".join(cell) for cell in cells] for layer, cells in layers.items()}
