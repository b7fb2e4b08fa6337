"""Assignments: which choice each layer group takes. Hashable, YAML and JSON both ways."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from autoquant.errors import ConfigError
from autoquant.formats import BF16, Choice, all_formats
from autoquant.parsing import Unreadable, parse_yaml, read_text, why
from autoquant.plan.grouping import Groups

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Assignment:
    """Group name to choice, in checkpoint order; a group that is absent stays BF16."""

    items: tuple[tuple[str, Choice], ...]

    @classmethod
    def of(cls, choices: Mapping[str, Choice]) -> Self:
        return cls(tuple(choices.items()))

    @cached_property
    def _choices(self) -> dict[str, Choice]:
        return dict(self.items)

    def __getitem__(self, group: str) -> Choice:
        return self._choices.get(group, BF16)

    def __iter__(self) -> Iterator[tuple[str, Choice]]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def replace(self, changes: Mapping[str, Choice]) -> Self:
        """The same assignment with some groups changed."""
        return type(self).of({**self._choices, **changes})

    @cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the quantized groups' canonical form."""
        canonical = sorted((name, str(c)) for name, c in self.items if c != BF16)
        return hashlib.sha256(json.dumps(canonical).encode()).hexdigest()[:16]

    @cached_property
    def quantized(self) -> dict[str, set[str]]:
        """Names of the groups that leave BF16, with that of the format."""
        return {name: {str(choice.format)} for name, choice in self.items if choice != BF16}

    def counts(self) -> dict[str, int]:
        """Number of groups per format and, apart from it, with BF16 inputs; every format named."""
        counter = Counter(choice.form for _, choice in self.items)
        return dict.fromkeys(map(str, all_formats()), 0) | counter

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "groups": {name: str(choice) for name, choice in self.items},
        }

    @classmethod
    def from_dict(cls, data: Any, origin: str = "the assignment") -> Self:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: another schema, or an unknown format.
        """
        if not isinstance(data, dict) or not isinstance(data.get("groups"), dict):
            raise ConfigError(
                f"{origin} has no mapping `groups`.",
                fix=f"write `groups: {{group name: {' | '.join(map(str, all_formats()))}}}`.",
            )
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(
                f"{origin} has schema_version {data.get('schema_version')!r}, "
                f"this version reads {SCHEMA_VERSION}.",
                fix=f"set schema_version: {SCHEMA_VERSION} after checking the file.",
            )
        return cls.of({str(name): Choice.parse(str(c)) for name, c in data["groups"].items()})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a YAML or JSON file.

        Raises:
            ConfigError: unreadable, not YAML, or not an assignment.
        """
        try:
            data = parse_yaml(read_text(path))
        except (OSError, Unreadable) as error:
            raise ConfigError(
                f"assignment {path} {why(error)}.",
                fix="pass the assignment.yaml of a run directory.",
            ) from error
        return cls.from_dict(data, str(path))


def require_legal(assignment: Assignment, groups: Groups) -> None:
    """Return if every group may take its choice.

    Raises:
        ConfigError: the assignment names a group or a format that the model does not allow.
    """
    for name, choice in assignment:
        reason = groups[name].why_not(choice)
        if reason is not None:
            way_out = "choose another scale rule" if choice.is_cast else "choose a format"
            raise ConfigError(
                f"the assignment puts {name} into {choice}: {reason}.",
                fix=f"{way_out}{'' if choice.is_cast else ' of more bits'}.",
            )
