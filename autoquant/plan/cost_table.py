"""Costs from a file: what was measured of the products of a model, in any unit.

A row gives the cost of one product: the linears of a group that read one input, N summed over those
that engines fuse; of routed experts, N is that of one expert and the cost that of all of them. A
group costs what its products cost together. YAML:

    schema_version: 1
    unit: microseconds a token
    scale: 1000
    rows:
      - {role: qkv, shape: [6144, 4096], choice: nvfp4, cost: 12.5}
      - {role: "*", shape: "*", choice: bf16, cost: 40}

CSV has the columns role, n, k, choice and cost, and the other settings above them as comments, such
as `# scale: 1000`.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from autoquant.errors import ConfigError
from autoquant.formats import Choice
from autoquant.parsing import Unreadable, parse_yaml, read_text, why
from autoquant.plan.accounting import Accounting
from autoquant.plan.cost import Cost, Unit
from autoquant.plan.linears import LayerGroup, Linear
from autoquant.source.names import ROLES

ANY = "*"
"""Stands for every role, and for every shape."""

_COLUMNS = ["role", "n", "k", "choice", "cost"]

Key = tuple[str, tuple[int, int] | str, str]
"""Role, shape [N, K] and choice, as a row names them."""


class Row(BaseModel):
    """The cost of one product."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    shape: tuple[PositiveInt, PositiveInt] | Literal["*"]
    choice: str
    cost: Decimal = Field(ge=0, max_digits=40, decimal_places=20, allow_inf_nan=False)

    @property
    def key(self) -> Key:
        return self.role, self.shape, self.choice


class TableFile(BaseModel):
    """A cost table as it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1]
    unit: str = Field(min_length=1)
    scale: PositiveInt
    rows: list[Row] = Field(min_length=1)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a YAML file, or a CSV file by its ending.

        Raises:
            ConfigError: unreadable, or a value that the schema does not allow.
        """
        try:
            text = read_text(path)
            data = _of_csv(text) if path.suffix == ".csv" else parse_yaml(text)
        except (OSError, Unreadable) as error:
            raise ConfigError(
                f"cost table {path} {why(error)}.",
                fix="check the path; a table is YAML, or CSV with the ending .csv.",
            ) from error
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the table"
            raise ConfigError(
                f"cost table {path}: {place}: {first['msg']}, not {first['input']!r}.",
                fix="docs/search.md shows a table.",
            ) from None

    def steps(self, path: Path) -> dict[Key, int]:
        """Cost of every row in whole steps, `scale` to a unit.

        Raises:
            ConfigError: a role or choice that there is not, two rows for the same product, or a
                cost that is no whole number of steps.
        """
        steps: dict[Key, int] = {}
        for place, row in enumerate(self.rows):
            problem = None
            if row.role not in (*ROLES, ANY):
                problem = f"no role is called {row.role!r}; roles are {', '.join(ROLES)} and {ANY}"
            elif row.key in steps:
                problem = f"an earlier row gives the cost of {_words(row.key)}"
            elif (cost := Fraction(row.cost) * self.scale).denominator != 1:
                problem = f"{row.cost} is no whole number of steps of 1/{self.scale}"
            if problem is not None:
                raise ConfigError(f"cost table {path}: rows.{place}: {problem}.", fix="correct it.")
            Choice.parse(row.choice)
            steps[row.key] = int(cost)
        return steps


@dataclass(frozen=True, kw_only=True)
class CostTable(Cost):
    """What the groups of a model cost by a file."""

    unit_name: str
    scale: int
    """Steps of one unit."""
    steps: Mapping[tuple[str, Choice], int] = field(repr=False)
    """Of every group in each of its choices."""

    @classmethod
    def read(cls, path: Path, accounting: Accounting) -> Self:
        """The costs of a model by the table in `path`.

        Raises:
            ConfigError: the file cannot be read or meant, or has no row for a group in a choice.
        """
        table = TableFile.read(path)
        rows = table.steps(path)
        steps = {
            (group.name, choice): sum(
                _cost(rows, group, shape, choice, path) for shape in products(group)
            )
            for group in accounting.groups
            for choice in accounting.choices[group.name]
        }
        return cls(accounting=accounting, unit_name=table.unit, scale=table.scale, steps=steps)

    @property
    def name(self) -> str:
        return "table"

    @property
    def unit(self) -> Unit:
        name = self.unit_name
        return Unit(name=name, short=name, one=Fraction(self.scale), uncounted=self.uncounted)

    def of(self, group: str, choice: Choice) -> int:
        """Steps of the group under one of its choices."""
        return self.steps[group, choice]


def products(group: LayerGroup) -> Iterator[tuple[int, int]]:
    """Yield the shape [N, K] of each product of the group, in the order of its linears."""
    by_input: dict[str, list[Linear]] = {}
    for linear in group.linears:
        by_input.setdefault(linear.input_scale_set, []).append(linear)
    for linears in by_input.values():
        first = linears[0]
        fused = (one for one in linears if one.weight_scale_set == first.weight_scale_set)
        yield sum(linear.out_features for linear in fused), first.in_features


def _cost(
    rows: Mapping[Key, int],
    group: LayerGroup,
    shape: tuple[int, int],
    choice: Choice,
    path: Path,
) -> int:
    """Of the rows that fit, the one that names the role, then the shape, then more of the choice.

    `nvfp4` stands for every scale rule and rounding, not for other inputs: those take other time.
    """
    names = (str(choice), choice.form)
    for role in (group.role, ANY):
        for size in (shape, ANY):
            for name in names:
                if (role, size, name) in rows:
                    return rows[role, size, name]
    raise ConfigError(
        f"cost table {path} has no row for {group.name} in {choice}: "
        f"{_words((group.role, shape, str(choice)))}.",
        fix=f"add one, or one with the shape {ANY!r}.",
    )


def _words(key: Key) -> str:
    role, shape, choice = key
    size = shape if isinstance(shape, str) else list(shape)
    return f"role {role}, shape {size}, choice {choice}"


def _of_csv(text: str) -> dict[str, Any]:
    """A CSV table in the form of the YAML one.

    Raises:
        Unreadable: other columns, or no CSV.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    settings: dict[str, Any] = {}
    for line in lines:
        name, _, value = line.removeprefix("#").partition(":")
        if line.startswith("#") and name.strip() in TableFile.model_fields:
            settings[name.strip()] = parse_yaml(value)
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    rows = []
    try:
        if reader.fieldnames != _COLUMNS:
            raise Unreadable(f"has the columns {reader.fieldnames}, not {_COLUMNS}")
        for row in reader:
            n, k = row.pop("n"), row.pop("k")
            rows.append({**row, "shape": ANY if n == k == ANY else (n, k)})
    except csv.Error as error:
        raise Unreadable(f"is not CSV: {error}") from None
    return {**settings, "rows": rows}
