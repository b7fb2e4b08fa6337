"""A live model whose layer groups can be put into any format and back.

The BF16 parameters are never written to: a quantized linear multiplies with another tensor.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from autoquant.formats import BF16, Choice
from autoquant.model import weights
from autoquant.model.attention import QuantizedCache
from autoquant.model.binding import DenseSlot, ExpertsSlot, Names, Slot, bind
from autoquant.model.experts import DOWN, WIDE, ExpertsHook, parameter_name
from autoquant.model.inputs import ActivationMode, InputScales, InputSet
from autoquant.model.weights import WeightStore
from autoquant.plan.assignment import Assignment
from autoquant.plan.linears import LayerGroup


@dataclass(slots=True)
class GroupState:
    """The choice that a group's linears follow at this moment."""

    group: LayerGroup
    choice: Choice = BF16


@dataclass(slots=True)
class ExpertCounts:
    """Tokens that each expert of a block saw while observing, [E]."""

    block: str
    tokens: torch.Tensor | None = None


@dataclass(slots=True)
class _Context:
    """What all slots of a model share."""

    mode: ActivationMode
    store: WeightStore
    inputs: dict[str, InputSet] = field(default_factory=dict)
    last_read: InputSet | None = None

    def forget_inputs(self) -> None:
        """Drop the tensors of the set that was read last."""
        if self.last_read is not None:
            self.last_read.forget()
            self.last_read = None

    def input_set(self, name: str) -> InputSet:
        return self.inputs.setdefault(name, InputSet(name))

    def read(self, x: torch.Tensor, inputs: InputSet, choice: Choice) -> torch.Tensor:
        """The input as the linear sees it, observed on the way if the set is observing.

        Only the set that was read last keeps its tensors: the linears that share one follow each
        other, and the inputs of all layers together would take many times the model's memory.
        """
        if self.last_read is not inputs:
            self.forget_inputs()
            self.last_read = inputs
        if inputs.observing:
            inputs.observe(x)
        if self.mode.quantizes_input(choice.format):
            return inputs.quantize(x, choice.format)
        return x


class _DenseForward:
    """Replaces the forward of one `nn.Linear`."""

    def __init__(self, slot: DenseSlot, state: GroupState, context: _Context, amax: float) -> None:
        self.slot, self.state, self.context, self.amax = slot, state, context, amax
        self.inputs = context.input_set(slot.input_scale_set)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(*self.operands(x), self.slot.module.bias)

    def operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and weight that the linear multiplies at this moment."""
        weight, choice = self.slot.module.weight, self.state.choice
        x = self.context.read(x, self.inputs, choice)
        if choice != BF16:
            key = (self.slot.name, choice)
            compute = partial(weights.fake_quantize, weight, self.amax, choice)
            weight = self.context.store.get(key, weight, compute)
        return x, weight


class _ExpertsForward(ExpertsHook):
    """Stands between a block's experts and their operands."""

    def __init__(self, slot: ExpertsSlot, state: GroupState, context: _Context) -> None:
        self.slot, self.state, self.context = slot, state, context
        self.inputs = {part: context.input_set(name) for part, name in slot.input_set.items()}
        self.counts = ExpertCounts(slot.name)
        self.amax: dict[str, torch.Tensor] = {}

    def routed(self, counts: torch.Tensor, tokens: torch.Tensor) -> None:
        if self.inputs[WIDE].observing:
            seen = self.counts.tokens
            self.counts.tokens = counts.clone() if seen is None else seen + counts

    def input(self, part: str, rows: torch.Tensor) -> torch.Tensor:
        return self.context.read(rows, self.inputs[part], self.state.choice)

    def weight(self, part: str, weight: torch.Tensor) -> torch.Tensor:
        choice = self.state.choice
        if choice == BF16:
            return weight
        if part not in self.amax:
            self.amax[part] = weights.largest_of_experts(weight)
        compute = partial(weights.fake_quantize, weight, self.amax[part], choice)
        return self.context.store.get((f"{self.slot.name}:{part}", choice), weight, compute)


class QuantizedModel:
    """Puts formats on a model's layer groups and takes them off, exactly.

    Args:
        model: a transformers causal language model in BF16, loaded by `load_model`.
        groups: the groups that may leave BF16; the rest of the model is not touched.
        mode: which inputs are quantized.
        weight_cache_bytes: memory for fake-quantized weights beside the model.
        attention: names on disk of the attention modules whose keys and values are cached in FP8.

    Raises:
        SourceError: a group's linear cannot be found or cannot be quantized.
    """

    def __init__(
        self,
        model: Any,
        groups: Iterable[LayerGroup],
        *,
        mode: ActivationMode,
        weight_cache_bytes: int = 2**31,
        attention: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.mode = mode
        self._names = Names(model)
        self.kv_cache = QuantizedCache(model, self._names, attention) if attention else None
        self._context = _Context(mode=mode, store=WeightStore(weight_cache_bytes))
        self._states: dict[str, GroupState] = {}
        self._slots: list[tuple[GroupState, Slot]] = []
        self._experts: list[_ExpertsForward] = []
        for group in groups:
            self._states[group.name] = GroupState(group)
            self._install(self._states[group.name])
        self._context.store.recent_bytes = self._largest_layer()

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        return tuple(state.group for state in self._states.values())

    @property
    def dense_slots(self) -> tuple[DenseSlot, ...]:
        """Where the groups' linears are, those in 3-D parameters aside."""
        return tuple(slot for _, slot in self._slots if isinstance(slot, DenseSlot))

    def apply(self, assignment: Assignment, *, with_cache: bool = False) -> None:
        """Put every group into its choice; groups that the assignment lacks return to BF16.

        Args:
            assignment: group to choice.
            with_cache: whether keys and values are rounded too, where there is such a cache.
        """
        for name, state in self._states.items():
            state.choice = assignment[name]
        if self.kv_cache is not None:
            self.kv_cache.round(with_cache)

    def choose(self, choices: Mapping[str, Choice]) -> None:
        """Put the named groups into a choice and all others into BF16."""
        self.apply(Assignment.of(choices))

    def operands(self, module: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and weight that `module` multiplies at this moment, whether searched or not."""
        forward = module.__dict__.get("forward")
        return forward.operands(x) if isinstance(forward, _DenseForward) else (x, module.weight)

    def modules(self) -> Iterator[tuple[str, Any]]:
        """Each module that multiplies with weights of a group, after the group's name."""
        for state, slot in self._slots:
            yield state.group.name, slot.module

    def forget_inputs(self) -> None:
        """Drop tensors of the last forward, so that no memory outlives it."""
        self._context.forget_inputs()

    @contextmanager
    def observing(self, *, all_experts: bool = False) -> Iterator[None]:
        """Collect ranges and expert counts during the forwards inside.

        Args:
            all_experts: take the ranges from every expert on every token; what the blocks
                compute, and the counts, stay those of the model's own routing.
        """
        self._observe(True)
        for forward in self._experts:
            forward.sees_every_token = all_experts
        try:
            yield
        finally:
            self._observe(False)
            for forward in self._experts:
                forward.sees_every_token = False
            self.forget_inputs()

    def observed_ranges(self) -> dict[str, float | None]:
        """Largest input magnitude of each input set; None where no token arrived."""
        return {name: inputs.observed for name, inputs in self._context.inputs.items()}

    def expert_counts(self) -> dict[str, list[int]]:
        """Tokens that each expert of each block saw while observing."""
        return {
            forward.counts.block: forward.counts.tokens.tolist()
            for forward in self._experts
            if forward.counts.tokens is not None
        }

    def set_input_scales(self, scales: Mapping[str, InputScales]) -> None:
        """Fix the static scales of the named input sets."""
        for name, value in scales.items():
            self._context.input_set(name).scales = value

    def set_weights(self, weights: Mapping[str, torch.Tensor], assignment: Assignment) -> None:
        """Multiply with given weights wherever `assignment` quantizes.

        Args:
            weights: dequantized [N, K] of every quantized linear, by its tensor name on disk.
            assignment: the choices under which they are used.
        """
        for state, slot in self._slots:
            choice = assignment[state.group.name]
            if choice == BF16:
                continue
            if isinstance(slot, DenseSlot):
                joined = torch.cat([weights[linear.tensor] for linear in slot.linears])
                self._context.store.put((slot.name, choice), joined, slot.module.weight)
                continue
            for part, linears in ((WIDE, slot.wide), (DOWN, slot.down)):
                like = getattr(slot.module, parameter_name(slot.module, part))
                stacked = torch.cat([weights[linear.tensor] for linear in linears]).view_as(like)
                self._context.store.put((f"{slot.name}:{part}", choice), stacked, like)

    def _largest_layer(self) -> int:
        """Bytes of a layer's weights, for a GPU: it may run a layer several times in turn."""
        sizes: dict[int | None, int] = {}
        for state, slot in self._slots:
            for parameter in slot.module.parameters(recurse=False):
                if parameter.is_cuda and state.group.layer is not None:
                    size = parameter.numel() * parameter.element_size()
                    sizes[state.group.layer] = sizes.get(state.group.layer, 0) + size
        return max(sizes.values(), default=0)

    def _observe(self, on: bool) -> None:
        for inputs in self._context.inputs.values():
            inputs.observing = on
        if self.kv_cache is not None:
            self.kv_cache.observe(on)

    def _install(self, state: GroupState) -> None:
        slots = bind(self._names, state.group)
        self._slots += [(state, slot) for slot in slots]
        ranges: dict[str, float] = {}
        for slot in slots:
            if isinstance(slot, DenseSlot):
                name = slot.weight_scale_set
                own = weights.largest_magnitude(slot.module.weight)
                ranges[name] = max(own, ranges.get(name, 0.0))
        for slot in slots:
            if isinstance(slot, DenseSlot):
                amax = ranges[slot.weight_scale_set]
                forward = _DenseForward(slot, state, self._context, amax)
                slot.module.forward = forward  # type: ignore[method-assign, assignment]
            else:
                hook = _ExpertsForward(slot, state, self._context)
                slot.module.autoquant_hook = hook
                self._experts.append(hook)
