"""Search spaces as YAML: the schema, precise errors, and the spaces that AutoQuant ships."""

import difflib
import importlib.resources
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from autoquant.errors import ConfigError
from autoquant.formats import (
    GPTQ,
    NEAREST,
    PLAIN_RULES,
    REFIT,
    Choice,
    Format,
    ScaleRule,
    all_formats,
    choices_of,
)
from autoquant.parsing import Unreadable, parse_yaml, read_text, why
from autoquant.plan.space import ROLE, Effort, Rule, SearchSpace, Way
from autoquant.source.names import ROLES


def format_texts() -> tuple[str, ...]:
    """Everything that a rule's `formats` may hold: formats, and each of their choices."""
    choices = (choice for format in all_formats() for choice in choices_of(format))
    open_to_all = (str(choice) for choice in choices if choice.rounding != REFIT)
    nearest = (f"{format}/{NEAREST}" for format in all_formats() if format.roundings[1:])
    return tuple(dict.fromkeys((*map(str, all_formats()), *open_to_all, *nearest)))


def _spelling(format: Format) -> str:
    """What a rule may say of a format, in brackets what it may leave out."""
    rules = [rule for rule in format.scale_rules if rule is not None]
    roundings = [way for way in format.roundings if way != REFIT]
    axes = rules, roundings if roundings[1:] else [], format.inputs[1:]
    return "".join((str(format), *(f"[/{'|'.join(map(str, axis))}]" for axis in axes if axis)))


def _known_pattern(pattern: str) -> str:
    if ROLE.fullmatch(pattern) and pattern not in ROLES:
        raise ValueError(
            f"no role has this name; roles are {', '.join(ROLES)}, "
            "and a glob over group names holds a dot or a *"
        )
    return pattern


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _known_format(text: str) -> str:
    try:
        choice = Choice.parse(text)
    except ConfigError:
        spellings = ", ".join(map(_spelling, all_formats()))
        raise ValueError(f"not a format; formats are {spellings}") from None
    if choice.rounding == REFIT:
        raise ValueError(
            "refitted codes belong to one assignment: --effort max makes them for its winner, and "
            "no space opens them"
        )
    return text


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RuleFile(_Strict):
    """One rule: the groups it matches and the formats they may take."""

    match: Annotated[
        list[Annotated[str, AfterValidator(_known_pattern)]],
        BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
    ] = Field(min_length=1, description="A role, a glob over group names, or a list of them.")
    formats: list[Annotated[str, AfterValidator(_known_format)]] = Field(
        min_length=1,
        description="A format (with every rule of scale_rules and every rounding of roundings that "
        "it has), or some choices of it such as nvfp4/max, nvfp4/gptq, fp8/nearest or nvfp4/a16 "
        "(inputs in BF16).",
    )
    reason: str = Field(default="", description="Why the other formats are closed.")


class SpaceFile(_Strict):
    """A search space."""

    schema_version: Literal[1]
    name: str = Field(min_length=1)
    description: str = ""
    scale_rules: list[ScaleRule] | None = Field(
        default=None,
        min_length=1,
        description="What a format without a rule means; with neither these nor roundings --effort "
        "decides.",
    )
    roundings: list[Literal["nearest", "gptq"]] | None = Field(
        default=None, min_length=1, description="The same for how codes are chosen."
    )
    shared_experts: Literal["with_routed", "separate"] = Field(
        default="with_routed",
        description="Whether a shared expert takes its layer's routed format; engines may fuse it.",
    )
    rules: list[RuleFile] = Field(min_length=1, description="The first rule that matches decides.")

    def to_space(self, effort: Effort) -> SearchSpace:
        """The space without its YAML clothes."""
        ways = self._ways() or effort.ways
        return SearchSpace(
            name=self.name,
            description=self.description,
            shared_experts=self.shared_experts,
            rules=tuple(_rule(rule, ways) for rule in self.rules),
        )

    def _ways(self) -> tuple[Way, ...]:
        """What the file itself says of scale rules and roundings; nothing where it leaves both."""
        if self.scale_rules is None and self.roundings is None:
            return ()
        rules = (*map(str, self.scale_rules or PLAIN_RULES), None)
        return tuple((rule, way) for rule in rules for way in self.roundings or (NEAREST,))


def _rule(rule: RuleFile, ways: Sequence[Way]) -> Rule:
    choices = dict.fromkeys(
        choice for text in rule.formats for choice in Choice.parse_all(text, ways)
    )
    return Rule(
        match=tuple(rule.match),
        choices=tuple(sorted(choices, key=lambda choice: choice.format.weight_bits)),
        reason=rule.reason,
        casts=frozenset(text for text in rule.formats if "/" not in text),
    )


def load_space(name_or_path: str | Path, effort: Effort = Effort.FAST) -> SearchSpace:
    """A shipped space by its name, or a YAML file.

    Args:
        name_or_path: a path ends in .yaml or .yml.
        effort: says what formats stand for where the space does not.

    Raises:
        ConfigError: no such space, not YAML, or a value that the schema does not allow.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        try:
            text = read_text(path)
        except (OSError, Unreadable) as error:
            raise ConfigError(
                f"search space {path} {why(error)}.", fix="check the path."
            ) from error
        return parse_space(text, str(path), effort)
    return parse_space(shipped_text(str(name_or_path)), f"{name_or_path}.yaml", effort)


def parse_space(text: str, origin: str, effort: Effort = Effort.FAST) -> SearchSpace:
    """The space that the YAML `text` of the file `origin` describes under an effort.

    Raises:
        ConfigError: not YAML, or a value that the schema does not allow.
    """
    try:
        data = parse_yaml(text)
    except Unreadable as error:
        raise ConfigError(
            f"{origin} {error}.",
            fix="`autoquant spaces show default` prints an example.",
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{origin} is not a mapping.", fix="`autoquant spaces show default` prints an example."
        )
    try:
        return SpaceFile.model_validate(data).to_space(effort)
    except ValidationError as error:
        raise _explain(origin, error) from None


def shipped_names() -> tuple[str, ...]:
    """Names of the spaces that AutoQuant ships."""
    files = (file.name for file in _folder().iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml")))


def shipped_text(name: str) -> str:
    """The YAML of a shipped space.

    Raises:
        ConfigError: no such space.
    """
    names = shipped_names()
    if name not in names:
        raise ConfigError(
            f"there is no search space {name!r}; shipped are {', '.join(names)}.",
            fix=_did_you_mean(name, names) or "a file of your own ends in .yaml.",
        )
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def schema() -> dict[str, Any]:
    """The JSON schema of a search space."""
    return SpaceFile.model_json_schema()


def _folder() -> Traversable:
    """The installed package of spaces, or its folder in a checkout that is not installed."""
    try:
        return importlib.resources.files("autoquant.search_spaces")
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "search_spaces"


def _explain(origin: str, error: ValidationError) -> ConfigError:
    """The first problem: file, place, value, rule, and the nearest correct spelling."""
    first = error.errors(include_url=False)[0]
    location = first["loc"]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    name = str(location[-1]) if location else ""
    if first["type"] == "extra_forbidden":
        known = RuleFile.model_fields if "rules" in location else SpaceFile.model_fields
        what = "is not a setting"
        fix = _did_you_mean(name, known) or f"settings here are {', '.join(known)}."
    elif first["type"] == "missing":
        what, fix = "is missing", "add it; `autoquant spaces schema` describes every setting."
    else:
        rule = first["msg"].removeprefix("Value error, ")
        what = f"is {first['input']!r}: {rule[0].lower()}{rule[1:]}"
        setting = next((part for part in reversed(location) if isinstance(part, str)), "")
        given = str(first["input"]).replace(REFIT, GPTQ)
        fix = _did_you_mean(given, _values().get(setting, ())) or "correct it."
    return ConfigError(f"{origin}: {place.lstrip('.')} {what}.", fix=fix)


def _values() -> dict[str, tuple[str, ...]]:
    """What settings may hold, of those that hold one of a few words."""
    rules = tuple(map(str, ScaleRule))
    return {
        "match": ROLES,
        "formats": format_texts(),
        "scale_rules": rules,
        "roundings": (NEAREST, GPTQ),
    }


def _did_you_mean(given: str, known: Any) -> str | None:
    close = difflib.get_close_matches(given, [str(name) for name in known], n=1)
    return f"did you mean {close[0]!r}?" if close else None
