"""A finished search as the state that `mtq.auto_quantize` returns beside the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoquant.environment import modelopt
from autoquant.export.layouts.presets import preset_of
from autoquant.files import read_number
from autoquant.formats import BF16, Choice
from autoquant.modelopt.space import Wishes
from autoquant.plan.assignment import Assignment
from autoquant.plan.plan import Plan
from autoquant.store.run_directory import ASSIGNMENT, SENSITIVITY, read_json


def search_state(
    plan: Plan,
    run: Path,
    *,
    modules: Mapping[str, Sequence[str]],
    wishes: Wishes,
    method: str,
    result: dict[str, Any],
) -> dict[str, Any]:
    """The state, whose parts are named as ModelOpt names them.

    Args:
        plan: of the search.
        run: its directory.
        modules: names in memory, by group.
        wishes: what was asked for.
        method: `gradient` or `kl_div`.
        result: the contents of `result.json`.
    """
    assignment = Assignment.read(run / ASSIGNMENT)
    probes = (read_json(run, SENSITIVITY) or {})["probes"]
    kl = {(p["group"], Choice.parse(p["choice"])): read_number(p["kl"]) for p in probes}
    stats, best = {}, {}
    for group in plan.groups:
        choices = plan.options.choices[group.name]
        own = _Candidates(
            choices, [0.0 if c == BF16 else kl.get((group.name, c), 0.0) for c in choices]
        )
        name = f"{modules[group.name][0]}.quant_recipe"
        stats[name] = own.stats(group.elements) | {
            "module_names": list(modules[group.name]),
            "allow_no_quant": BF16 in choices,
            "is_fixed": False,
        }
        best[name] = recipe_of(assignment[group.name])
    return {
        "method": method,
        "cost_model": "weight",
        "cost": {},
        "cost_denominator": float(sum(group.elements for group in plan.groups)),
        "disabled_layers": list(wishes.disabled),
        "candidate_stats": stats,
        "best": {
            "recipe": best,
            "constraints": {"effective_bits": wishes.effective_bits},
            "score": result["winner"]["predicted_kl"],
            "is_satisfied": True,
        },
        "autoquant": result,
    }


def recipe_of(choice: Choice) -> Any:
    """ModelOpt's recipe of a choice."""
    recipe = modelopt("torch.quantization.algorithms").QuantRecipe
    return recipe(quant_cfg=None if choice == BF16 else preset_of(choice))


class _Candidates:
    """The choices of one group with their scores, in ModelOpt's order: by bits, then as listed."""

    def __init__(self, choices: Sequence[Choice], scores: Sequence[float]) -> None:
        self._rows = sorted(
            zip(choices, scores, strict=True), key=lambda row: row[0].format.weight_bits
        )

    def stats(self, elements: int) -> dict[str, Any]:
        """Recipes, scores in nats per token, and costs in elements of 16 bits."""
        return {
            "formats": [recipe_of(choice) for choice, _ in self._rows],
            "scores": [score for _, score in self._rows],
            "costs": [elements * float(c.format.weight_bits) / 16 for c, _ in self._rows],
            "uncompressed_cost": float(elements),
            "cost_weight": 1.0,
        }
