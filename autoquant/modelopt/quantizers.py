"""A search's assignment as ModelOpt's quantizers on a model in memory.

The quantizers have our ranges: the largest magnitude of everything that shares a scale in the
checkpoint, and the calibrated one of each input. Where block scales are not simply those of the
largest magnitude, ModelOpt's static quantizer holds the ones that were chosen.

Shapes: N outputs, K inputs, E experts.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.api import Run, load_run
from autoquant.codes.book import CodeBook
from autoquant.environment import modelopt
from autoquant.errors import ConfigError
from autoquant.export.declaration import quantized_linears
from autoquant.export.layouts.base import Layout, form_of
from autoquant.export.layouts.recipe import modelopt_recipe
from autoquant.formats import (
    BF16,
    GLOBAL_SCALE,
    NEAREST,
    NVFP4_BLOCK,
    SCALE,
    Choice,
    ScaleRule,
)
from autoquant.formats.kv_cache import KvCache
from autoquant.formats.packed import Packed
from autoquant.measure.calibration import Calibration, read_calibration
from autoquant.model.binding import DenseSlot, Names, Slot, bind
from autoquant.model.experts import parameter_name
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import Groups, find_groups
from autoquant.plan.kv_cache import cached_attention
from autoquant.plan.linears import LayerGroup, Linear
from autoquant.run.measuring import book_of_run
from autoquant.run.polishing import require_codes
from autoquant.source.source import open_source
from autoquant.store.run_directory import ASSIGNMENT, CALIBRATION, read_identity

E2M1_MAX = 6.0


def apply(model: Any, run: Run | Path | str) -> Any:
    """Put ModelOpt's quantizers on `model`, set for the winner of a search.

    The model then computes with fake-quantized weights and inputs, and is what ModelOpt trains
    further (QAT, QAD), saves (`mto.save`) and exports. NVFP4 is simulated by ModelOpt on GPUs
    alone. Where codes were compensated (`gptq`), weights become the numbers that the codes stand
    for, since ModelOpt rounds each weight to the nearest.

    Args:
        model: the searched model as transformers loads it; changed in place.
        run: a finished search, or its run directory.

    Returns:
        The model, as `mtq.quantize` returns it.

    Raises:
        ConfigError: the search is not finished, or ModelOpt is not installed.
        RunConflict: this version would make other codes than the run's.
        SourceError: the run or its source is damaged, or `model` is another one.
    """
    run = run if isinstance(run, Run) else load_run(run)
    if run.result is None:
        raise ConfigError(
            f"{run.path} is {run.status}: there is no winner to apply.",
            fix="let the search finish: the same command goes on with it.",
        )
    source = open_source(run.result["model"], revision=run.result["source"]["revision"])
    groups = find_groups(source, shared_experts=_shared_experts(run.path))
    assignment = Assignment.read(run.path / ASSIGNMENT)
    require_codes(assignment, run.path)
    quantized = [group for group in groups if assignment[group.name] != BF16]
    kv_cache = KvCache(run.result["kv_cache"])
    return set_quantizers(
        model,
        groups,
        assignment,
        read_calibration(run.path / CALIBRATION, quantized, cached_attention(kv_cache, groups)),
        book_of_run(source, run.path),
    )


def _shared_experts(run: Path) -> Any:
    """How the search grouped shared experts."""
    return (read_identity(run) or {})["signature"]["shared_experts"]


def set_quantizers(
    model: Any,
    groups: Groups,
    assignment: Assignment,
    calibration: Calibration,
    book: CodeBook,
) -> Any:
    """Put ModelOpt's quantizers on `model` for an assignment of its groups.

    Args:
        model: changed in place.
        groups: of the checkpoint that the model was loaded from.
        assignment: what is not in it stays in BF16.
        calibration: with a range for every input of a quantized group.
        book: gives the codes whose block scales are taken over.

    Raises:
        ConfigError: ModelOpt is not installed.
        SourceError: the model has no module for a group.
    """
    mtq = modelopt("torch.quantization")
    names = Names(model)
    slots = {g.name: bind(names, g) for g in groups if assignment[g.name] != BF16}
    attention = {name: _attention(model, names, name) for name in calibration.kv_ranges}
    ranges, inputs = _ranges(slots.values()), calibration.ranges()
    kv_cache = KvCache.of(quantized=bool(calibration.kv_ranges))
    recipe = modelopt_recipe(quantized_linears(groups, assignment), kv_cache)["quantize"]
    model = mtq.quantize(model, recipe | {"algorithm": None})
    with torch.no_grad():
        for group in groups:
            for slot in slots.get(group.name, ()):
                for place in _places(slot):
                    _set(place, group, assignment[group.name], inputs, ranges, book)
        for name, kv in calibration.kv_ranges.items():
            device = attention[name].k_proj.weight.device
            attention[name].k_bmm_quantizer.amax = torch.tensor(kv.keys, device=device)
            attention[name].v_bmm_quantizer.amax = torch.tensor(kv.values, device=device)
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """One weight of a module, or one product of its experts, and where its quantizers are."""

    module: nn.Module
    parameter: str
    matrices: tuple[tuple[Linear, ...], ...]
    """The linears whose rows each matrix joins; several are the experts of one product."""
    is_stack: bool

    @property
    def weights(self) -> Sequence[Tensor]:
        """Each matrix [N, K]."""
        weight = getattr(self.module, self.parameter).detach()
        return weight if self.is_stack else [weight]

    @property
    def quantizers(self) -> Sequence[Any]:
        """Of each matrix."""
        if self.is_stack:
            own: Sequence[Any] = getattr(self.module, f"{self.parameter}_weight_quantizers")
            return own
        return [self.module.weight_quantizer]

    @property
    def input_quantizer(self) -> Any:
        name = f"{self.parameter}_input_quantizer" if self.is_stack else "input_quantizer"
        return getattr(self.module, name)


def _places(slot: Slot) -> Iterator[_Place]:
    if isinstance(slot, DenseSlot):
        yield _Place(
            module=slot.module, parameter="weight", matrices=(slot.linears,), is_stack=False
        )
        return
    for part, linears in slot.products.items():
        each = len(linears) // slot.module.num_experts
        yield _Place(
            module=slot.module,
            parameter=parameter_name(slot.module, part),
            matrices=tuple(linears[i : i + each] for i in range(0, len(linears), each)),
            is_stack=True,
        )


def _ranges(slots: Any) -> dict[str, Tensor]:
    """Largest magnitude of each weight scale set, float32; 1 for one of zeros."""
    found: dict[str, Tensor] = {}
    for place in (place for own in slots for slot in own for place in _places(slot)):
        for matrix, weight in zip(place.matrices, place.weights, strict=True):
            name = matrix[0].weight_scale_set
            largest = weight.abs().amax().float()
            found[name] = torch.maximum(largest, found.get(name, largest))
    return {name: torch.where(amax == 0, 1.0, amax) for name, amax in found.items()}


def _set(
    place: _Place,
    group: LayerGroup,
    choice: Choice,
    inputs: Mapping[str, float],
    ranges: Mapping[str, Tensor],
    book: CodeBook,
) -> None:
    for matrix, weight, quantizer in zip(
        place.matrices, place.weights, place.quantizers, strict=True
    ):
        amax = ranges[matrix[0].weight_scale_set].to(weight.device)
        if _follows_the_weight(choice):
            quantizer.amax = amax
            continue
        packed = Packed.joined([book.linear(group, linear, choice) for linear in matrix])
        if choice.rounding != NEAREST:
            weight.copy_(packed.decode())
        if choice.scale_rule is None:
            quantizer.amax = amax  # the numbers of codes are coded again under the same scale
        else:
            _fix_block_scales(quantizer, choice, packed, amax)
    if not choice.keeps_input:
        held = inputs[place.matrices[0][0].input_scale_set]
        place.input_quantizer.amax = torch.tensor(held or 1.0, device=place.weights[0].device)


def _follows_the_weight(choice: Choice) -> bool:
    """Whether the largest magnitudes alone give every scale, at whatever the weight becomes."""
    return choice.rounding == NEAREST and choice.scale_rule in (None, ScaleRule.MAX)


def _fix_block_scales(quantizer: Any, choice: Choice, packed: Packed, amax: Tensor) -> None:
    """Make the quantizer a static one that rounds and exports with the block scales of `packed`."""
    static = modelopt("torch.quantization.nn").NVFP4StaticQuantizer
    declared = form_of(Layout.MODELOPT, choice.format).declared["quantizer"]
    attributes = copy.deepcopy(dict(declared))
    attributes["num_bits"] = tuple(attributes["num_bits"])
    blocks = {-1: NVFP4_BLOCK, "type": "static"}
    blocks["scale_bits"] = tuple(attributes["block_sizes"]["scale_bits"])
    if choice.scale_rule == ScaleRule.FOUR_OVER_SIX:
        blocks["four_over_six"] = 1
    quantizer.set_from_attribute_config(attributes | {"block_sizes": blocks})
    scale = packed.parts[SCALE].float().cpu() * packed.parts[GLOBAL_SCALE].cpu()
    quantizer.amax = (scale * E2M1_MAX).view(-1, 1).to(amax.device)
    static.from_tensor_quantizer(quantizer, global_amax=amax)


def _attention(model: Any, names: Names, name: str) -> Any:
    """The module in memory of an attention module that is called `name` on disk."""
    located, _ = names.locate(f"{name}.k_proj.weight")
    return model.get_submodule(located.removesuffix(".k_proj.weight"))
