"""A live model whose layer groups can be put into any format and back.

The BF16 parameters are never written to: a quantized linear multiplies with another tensor.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from autoquant.codes.book import CodeBook
from autoquant.codes.cache import CodeCache
from autoquant.codes.held import CODES_OF_A_BLOCK
from autoquant.codes.kept import Kept
from autoquant.codes.statistics import DriftStatistics, StatisticsStore
from autoquant.codes.weights import WeightSource
from autoquant.formats import BF16, REFIT, Choice
from autoquant.model.attention import QuantizedCache
from autoquant.model.binding import DenseSlot, ExpertsSlot, Names, Slot, bind
from autoquant.model.experts import WIDE, ExpertsHook
from autoquant.model.inputs import Clips, InputScale, InputSet
from autoquant.model.live_weights import LiveWeights
from autoquant.model.products import CpuProducts
from autoquant.model.replacing import replaced
from autoquant.model.streaming.stores import BlockStore, Brought
from autoquant.plan.activation_mode import ActivationMode
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
    book: CodeBook
    decoded: Kept[tuple[str, Choice], torch.Tensor]
    """Weights as they are multiplied with."""
    inputs: dict[str, InputSet] = field(default_factory=dict)
    last_read: InputSet | None = None
    clips: Clips | None = None
    """Where what is clipped of inputs is counted."""

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
        if self.mode.quantizes_input(choice):
            return inputs.quantize(x, choice.format, self.clips)
        return x

    def weight(self, state: GroupState, unit: str, weight: torch.Tensor) -> torch.Tensor:
        """What a unit's product multiplies with: its decoded codes, or the weight in BF16."""
        if state.choice == BF16:
            return weight
        choice = state.choice.of_weight

        def decode() -> torch.Tensor:
            found = {own.name: own for own in self.book.units(state.group)}[unit]
            packed = self.book.unit(state.group, found, choice)
            with torch.inference_mode(False):  # so that `Float32Copies` can keep a copy of it
                out = torch.empty_like(weight)
            return packed.decode(out=out)

        return self.decoded.get((unit, choice), weight.numel() * weight.element_size(), decode)


class _DenseForward:
    """Replaces the forward of one `nn.Linear`."""

    def __init__(
        self, slot: DenseSlot, module: nn.Linear, state: GroupState, context: _Context
    ) -> None:
        self.slot, self.module, self.state, self.context = slot, module, state, context
        self.inputs = context.input_set(slot.input_scale_set)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(*self.operands(x), self.module.bias)

    def operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and weight that the linear multiplies at this moment."""
        x = self.context.read(x, self.inputs, self.state.choice)
        return x, self.context.weight(self.state, self.slot.name, self.module.weight)


class _ExpertsForward(ExpertsHook):
    """Stands between a block's experts and their operands."""

    def __init__(self, slot: ExpertsSlot, state: GroupState, context: _Context) -> None:
        self.slot, self.state, self.context = slot, state, context
        self.inputs = {part: context.input_set(name) for part, name in slot.input_set.items()}
        self.counts = ExpertCounts(slot.name)

    def routed(self, counts: torch.Tensor, tokens: torch.Tensor) -> None:
        if self.inputs[WIDE].observing:
            seen = self.counts.tokens
            self.counts.tokens = counts.clone() if seen is None else seen + counts

    def input(self, part: str, rows: torch.Tensor) -> torch.Tensor:
        return self.context.read(rows, self.inputs[part], self.state.choice)

    def weight(self, part: str, weight: torch.Tensor) -> torch.Tensor:
        return self.context.weight(self.state, self.slot.unit_name(part), weight)


class QuantizedModel:
    """Puts formats on a model's layer groups and takes them off, exactly.

    Args:
        model: a transformers causal language model in BF16, loaded by `load_model`.
        groups: the groups that may leave BF16; the rest of the model is not touched.
        mode: which inputs are quantized.
        decoded_bytes: memory for decoded weights beside the model.
        packed_bytes: memory for codes beside the model.
        attention: names on disk of the attention modules whose keys and values are cached in FP8.
        codes: on disk, for codes that cost more to make than to read.
        statistics: of the inputs, for codes that rest on them.
        store: brings the weights of blocks; None where all of them are in the model.

    Raises:
        SourceError: a group's linear cannot be found or cannot be quantized.
    """

    def __init__(
        self,
        model: Any,
        groups: Iterable[LayerGroup],
        *,
        mode: ActivationMode,
        decoded_bytes: int = 2**31,
        packed_bytes: int = 2**31,
        attention: Sequence[str] = (),
        codes: CodeCache | None = None,
        statistics: StatisticsStore | None = None,
        store: BlockStore | None = None,
    ) -> None:
        self.model = model
        self.mode = mode
        self.statistics = statistics
        """Of the inputs, where codes rest on them."""
        self.products = CpuProducts.of(model)
        self._names = Names(model)
        self.kv_cache = QuantizedCache(model, self._names, attention) if attention else None
        self._states = {group.name: GroupState(group) for group in groups}
        slots = {name: bind(self._names, state.group) for name, state in self._states.items()}
        self._slots: list[tuple[GroupState, Slot]] = [
            (self._states[name], slot) for name, own in slots.items() for slot in own
        ]
        self._store = store
        self.weights: WeightSource = LiveWeights(slots, store)
        """Weights of every block."""
        is_streamed = store is not None and store.is_streamed
        recent = self._largest_layer(anywhere=is_streamed)
        self.book = CodeBook(
            self.weights,
            memory_bytes=packed_bytes,
            recent_bytes=CODES_OF_A_BLOCK * recent if is_streamed else 0,
            cache=codes,
            statistics=statistics,
        )
        """Codes of every group and choice."""
        self._context = _Context(mode=mode, book=self.book, decoded=Kept(decoded_bytes, recent))
        self._experts: list[_ExpertsForward] = []
        self._uses = uses_of(model, [slot for _, slot in self._slots])
        for state, slot in self._slots:
            self._install(state, slot)

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        return tuple(state.group for state in self._states.values())

    @property
    def slots(self) -> tuple[tuple[LayerGroup, Slot], ...]:
        """Where the weights of each group are."""
        return tuple((state.group, slot) for state, slot in self._slots)

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

    def use_polish(self, key: str) -> None:
        """Multiply with the refitted codes of another assignment from now on; see `CodeBook`."""
        self.book.use_polish(key)
        self._context.decoded.drop(lambda own: own[1].rounding == REFIT)

    def refit(
        self, group: LayerGroup, choice: Choice, statistics: DriftStatistics, *, is_whole: bool
    ) -> None:
        """Make refitted codes of a group and multiply with them; see `CodeBook.refit`."""
        self.book.refit(group, choice, statistics, is_whole=is_whole)
        names = {unit.name for unit in self.book.units(group)}
        self._context.decoded.drop(lambda own: own[0] in names and own[1].rounding == REFIT)

    def operands(self, module: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and weight that `module` multiplies at this moment, whether searched or not."""
        forward = module.__dict__.get("forward")
        return forward.operands(x) if isinstance(forward, _DenseForward) else (x, module.weight)

    def modules(self) -> Iterator[tuple[str, Any]]:
        """Each module that multiplies with weights of a group, after the group's name."""
        for state, slot in self._slots:
            for module in self._uses[slot.name]:
                yield state.group.name, module

    @property
    def brought(self) -> Brought:
        """What of the blocks' weights was brought to the device so far."""
        return Brought() if self._store is None else self._store.brought

    def settle(self) -> None:
        """Wait for weights that are on their way to the device."""
        if self._store is not None:
            self._store.settle()

    @contextmanager
    def replacing(self, attributes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
        """Give modules other attributes in the forwards inside; see `replaced`."""
        try:
            with replaced(attributes):
                yield
        finally:
            self.forget_inputs()

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

    def observed_sizes(self) -> dict[str, torch.Tensor]:
        """Blocks of each input set by the exponent of their largest magnitude, int64 on the host,
        where there are any.
        """
        found = {name: inputs.sizes for name, inputs in self._context.inputs.items()}
        return {name: sizes.cpu() for name, sizes in found.items() if sizes is not None}

    @contextmanager
    def counting(self, clips: Clips) -> Iterator[None]:
        """Count what the forwards inside clip of their inputs."""
        self.forget_inputs()  # which another forward may have read, and are counted once
        self._context.clips = clips
        try:
            yield
        finally:
            self._context.clips = None

    def expert_counts(self) -> dict[str, list[int]]:
        """Tokens that each expert of each block saw while observing."""
        return {
            forward.counts.block: forward.counts.tokens.tolist()
            for forward in self._experts
            if forward.counts.tokens is not None
        }

    def set_input_scales(self, scales: Mapping[str, InputScale]) -> None:
        """Fix the static scales of the named input sets."""
        for name, value in scales.items():
            self._context.input_set(name).scale = value

    def _largest_layer(self, *, anywhere: bool) -> int:
        """Bytes of a layer's weights, which may run several times in turn; of those on a GPU, or
        of all.
        """
        sizes: dict[int | None, int] = {}
        for state, slot in self._slots:
            for parameter in slot.module.parameters(recurse=False):
                if (anywhere or parameter.is_cuda) and state.group.layer is not None:
                    size = parameter.numel() * parameter.element_size()
                    sizes[state.group.layer] = sizes.get(state.group.layer, 0) + size
        return max(sizes.values(), default=0)

    def _observe(self, on: bool) -> None:
        for inputs in self._context.inputs.values():
            inputs.observing = on
        if self.kv_cache is not None:
            self.kv_cache.observe(on)

    def _install(self, state: GroupState, slot: Slot) -> None:
        if isinstance(slot, DenseSlot):
            for module in self._uses[slot.name]:
                module.forward = _DenseForward(slot, module, state, self._context)
        else:
            hook = _ExpertsForward(slot, state, self._context)
            for module in self._uses[slot.name]:
                module.autoquant_hook = hook
            self._experts.append(hook)


def uses_of(model: Any, slots: Iterable[Slot]) -> dict[str, list[Any]]:
    """The modules that multiply with each slot's weight, by the slot's name.

    There are several where layers share a parameter, which a checkpoint stores once (Zamba2).
    """
    holding: dict[int, list[Any]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holding.setdefault(id(parameter), []).append(module)
    found = {}
    for slot in slots:
        weight = slot.module.weight if isinstance(slot, DenseSlot) else slot.module.down_proj
        found[slot.name] = [own for own in holding[id(weight)] if type(own) is type(slot.module)]
    return found
