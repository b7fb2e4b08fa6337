"""The models that experiments compare on, as `subjects.yaml` lists them."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from autoquant.data.tokens import TokenPlan
from autoquant.plan.budget import Budget, Scope
from autoquant.source.source import REFERENCE_MODEL

FOLDER = Path(__file__).parent
MAX_ONLY = FOLDER / "max-only.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model with its text and budgets."""

    name: str
    path: Path
    text: Path
    scope: Scope
    bpes: tuple[float, ...]

    def budget(self, bpe: float) -> Budget:
        return Budget(bpe, self.scope)


def subject(name: str, models: Path, texts: Path) -> Subject:
    """The subject called `name`, its files under these folders."""
    entry: dict[str, Any] = yaml.safe_load((FOLDER / "subjects.yaml").read_text())[name]
    folder = entry["folder"]
    return Subject(
        name=name,
        path=models / folder if folder else REFERENCE_MODEL,
        text=texts / entry["text"],
        scope=Scope(entry["scope"]),
        bpes=tuple(entry["budgets"]),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every experiment takes."""
    parser.add_argument("--models", type=Path, default=Path("../shared/models"))
    parser.add_argument("--texts", type=Path, default=Path("runs/texts"))
    parser.add_argument("--subject", required=True, help="a name in subjects.yaml")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens and of the search")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="for run directories")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", default=None, help="of the code, where git cannot tell")


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for the tokens of each split, those of a search by default."""
    for name in ("calibration", "search", "report"):
        default = getattr(TokenPlan(), name)
        parser.add_argument(f"--{name}-tokens", type=int, default=default)
