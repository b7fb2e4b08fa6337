"""Scores that ModelOpt's `auto_quantize` has saved, as the sensitivities of a search.

ModelOpt scores by a loss squared (`gradient`) or by KL summed over its own tokens (`kl_div`), and
its state says neither of how many tokens nor of which model. So one assignment is measured, every
open group in its cheapest choice, and the scores are scaled until they add up to its KL.
"""

import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoquant.environment import modelopt
from autoquant.errors import ConfigError, SourceError, first_line
from autoquant.export.layouts.presets import presets
from autoquant.formats import BF16, Choice
from autoquant.measure.interactions import Key
from autoquant.measure.sensitivity import Sensitivity
from autoquant.measure.session import Session
from autoquant.plan.assignment import Assignment
from autoquant.plan.plan import Plan

METHOD = "modelopt"
"""What `sensitivity.json` says of where its numbers are from."""

_UNQUANTIZED = "NONE"
_OF_THIS_MODEL = "pass the file that mtq.auto_quantize(..., checkpoint=FILE) wrote for this model."


def modelopt_sensitivity(file: Path, session: Session, plan: Plan) -> Sensitivity:
    """What a state says of every open (group, choice), in nats per token of the search split.

    A choice has the score of the recipe that says the same, else of one with its format.

    Args:
        file: as `mtq.auto_quantize(..., checkpoint=FILE)` writes it.
        session: calibrated.
        plan: what is open.

    Raises:
        SourceError: the file is no such state, a broken one, or of another model.
        ConfigError: the state has no score for a format that is open, or ModelOpt is missing.
    """
    stats = _read(file)
    scores = _by_group(file, stats, session)
    keys = {
        (name, choice): _score_of(file, name, choice, scores.get(name, {}))
        for name in plan.options.open
        for choice in plan.options.choices[name]
        if choice != BF16
    }
    scale = _scale(file, keys, session, plan)
    kl = {key: score * scale for key, score in keys.items()}
    return Sensitivity(kl, dict.fromkeys(kl, math.nan))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stat:
    """What a state holds of modules that share a recipe."""

    modules: tuple[str, ...]
    """Names in memory."""
    elements: float | None
    """Of their weights, where they count fully."""
    scores: Mapping[str, float]
    """By the name of the recipe."""


def _read(file: Path) -> list[_Stat]:
    import torch

    modelopt("torch.quantization")  # makes its classes known to the unpickler
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        return [_stat(own) for own in state["candidate_stats"].values()]
    except FileNotFoundError as error:
        raise SourceError(f"{file} does not exist.", fix=_OF_THIS_MODEL) from error
    except (
        *(OSError, EOFError, RuntimeError, pickle.UnpicklingError),
        *(KeyError, TypeError, AttributeError, ValueError),
    ) as error:
        what = first_line(error)
        raise SourceError(
            f"{file} is no whole state of ModelOpt's auto_quantize: {what}.", fix=_OF_THIS_MODEL
        ) from error


def _stat(own: Mapping[str, Any]) -> _Stat:
    names = [str(recipe).partition("(")[0] for recipe in own["formats"]]
    scores = dict(zip(names, map(float, own["scores"]), strict=True))
    counts = own.get("cost_weight", 1.0) == 1.0
    elements = own.get("uncompressed_cost", max(own["costs"])) if counts else None
    return _Stat(modules=tuple(own["module_names"]), elements=elements, scores=scores)


def _by_group(file: Path, stats: Sequence[_Stat], session: Session) -> dict[str, dict[str, float]]:
    """Scores of each group by the recipe's name; groups of several stats have their sum."""
    group_of = dict(_modules(session))
    sizes = _sizes(session.loaded.model)
    found: dict[str, dict[str, float]] = {}
    for stat in stats:
        unknown = [name for name in stat.modules if name not in sizes]
        elements = sum(sizes.get(name, 0) for name in stat.modules)
        if unknown or (stat.elements is not None and elements != stat.elements):
            what = (
                f"it scores {unknown[0]}, which this model has not"
                if unknown
                else f"{stat.modules[0]} has {stat.elements:.0f} weights there and {elements} here"
            )
            raise SourceError(f"{file} is the state of another model: {what}.", fix=_OF_THIS_MODEL)
        for name in stat.modules:
            if name in group_of:
                own = found.setdefault(group_of[name], {})
                for recipe, score in stat.scores.items():
                    own[recipe] = own.get(recipe, 0.0) + score * sizes[name] / elements
    return found


def _modules(session: Session) -> Iterator[tuple[str, str]]:
    """Name in memory and group of every module with weights of an open group."""
    names = {module: name for name, module in session.loaded.model.named_modules()}
    for group, module in session.quantized.modules():
        yield names[module], group


def _sizes(model: Any) -> dict[str, int]:
    """Elements of the weights of each module by its name; biases aside."""
    return {
        name: sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
        for name, module in model.named_modules()
    }


def _score_of(file: Path, group: str, choice: Choice, scores: Mapping[str, float]) -> float:
    known = {presets()[name]: score for name, score in scores.items() if name in presets()}
    exactly = [score for other, score in known.items() if other == choice]
    in_form = [score for other, score in known.items() if other.form == choice.form]
    in_format = [score for other, score in known.items() if other.format == choice.format]
    for score in (*exactly, *in_form, *in_format):
        return score
    if not scores:
        raise SourceError(f"{file} has no scores for {group}.", fix=_OF_THIS_MODEL)
    recipes = ", ".join(name for name in scores if name != _UNQUANTIZED)
    raise ConfigError(
        f"{file} has no score for {group} in {choice}; it scores {recipes}.",
        fix="close the format in the search space, or have ModelOpt score it.",
    )


def _scale(file: Path, scores: Mapping[Key, float], session: Session, plan: Plan) -> float:
    """Nats per token of a unit of the scores, by one joint measurement."""
    cheapest = {name: plan.floor[name] for name in plan.options.open}
    together = sum(scores.get(key, 0.0) for key in cheapest.items())
    if not together > 0.0 or not math.isfinite(together):
        raise SourceError(
            f"the scores of {file} add up to {together} for the cheapest formats.",
            fix="have ModelOpt score more batches.",
        )
    measured = session.scorer.score(Assignment.of(cheapest), session.splits["search"]).mean
    return measured / together if math.isfinite(measured) else 1.0
