"""Kinds of sensitivities, and how well each ranks random assignments."""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import spearmanr

from autoquant.data.tokens import Split
from autoquant.formats import Choice
from autoquant.measure.interactions import Key
from autoquant.measure.method import ProbeMethod
from autoquant.measure.screen import anchors, scaled
from autoquant.measure.sensitivity import Sensitivity, keys_of
from autoquant.model.experts import DOWN, WIDE, parameter_name
from autoquant.search.problem import Problem
from autoquant.search.surrogate import Surrogate
from experiments.common.bench import Bench
from experiments.common.enumerate import random_filled


def sensitivities(bench: Bench) -> dict[str, Sensitivity]:
    """By each method of probing, and the weights' relative squared error."""
    keys = tuple(keys_of(bench.plan.options.choices))
    probed = {str(method): bench.probe(method) for method in ProbeMethod}
    exact, estimate = probed[ProbeMethod.EXACT], probed[ProbeMethod.GRADIENT]
    return probed | {
        "screened, all tokens": scaled(keys, anchors(keys, estimate), estimate, exact),
        "weight error": weight_errors(bench, keys),
    }


def weight_errors(bench: Bench, keys: tuple[Key, ...]) -> Sensitivity:
    """Squared error of a group's weights over their squares, times its share of the elements."""
    elements = {group.name: group.elements for group in bench.session.quantized.groups}
    total = sum(elements.values())
    found = {}
    for group, choice in keys:
        squares = [(_squares(q - w), _squares(w)) for q, w in _weights(bench, group, choice)]
        error, whole = (sum(column) for column in zip(*squares, strict=True))
        found[group, choice] = error / whole * elements[group] / total
    return Sensitivity(found, dict.fromkeys(found, 0.0))


def _weights(
    bench: Bench, group: str, choice: Choice
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each quantized weight of a group and the weight itself."""
    quantized = bench.session.quantized
    quantized.choose({group: choice})
    for name, module in quantized.modules():
        if name != group:
            continue
        hook = getattr(module, "autoquant_hook", None)
        if hook is None:
            unused = module.weight.new_zeros(1, module.weight.shape[1])
            yield quantized.operands(module, unused)[1], module.weight
            continue
        for part in (WIDE, DOWN):
            weight = getattr(module, parameter_name(module, part))
            yield hook.weight(part, weight), weight
    quantized.choose({})


@torch.no_grad()
def _squares(values: torch.Tensor) -> float:
    return float(values.float().square().sum())


def ranking(
    bench: Bench, problems: dict[str, Problem], split: Split, arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation of each kind's predictions with the measured KL."""
    drawn = random_filled(problems["exact"], arguments.random, arguments.seed)
    if len(drawn) < 10:
        return {name: {} for name in problems}
    decoded = [problems["exact"].decode(selection) for selection in drawn]
    kl = np.array([bench.score(assignment, split).mean for assignment in decoded])
    found = {}
    for name, problem in problems.items():
        predicted = Surrogate.of(problem, with_pairs=False).quadratic(drawn)
        found[name] = {"spearman": float(spearmanr(predicted, kl).statistic)}
    return found
