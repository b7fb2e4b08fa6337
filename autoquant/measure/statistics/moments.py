"""Second moments of the inputs of quantized weights, in BF16 on the calibration split.

Sequences go through the model one at a time and block by block: a block's sums are what memory
holds, time grows with the number of blocks, and a sum does not depend on how tokens are batched.
Every fourth sequence is held out: its products are summed apart.

Shapes: R rows that a weight multiplies, E experts, N outputs, K inputs.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoquant.codes.statistics import StatisticsStore
from autoquant.data.tokens import Split
from autoquant.formats import Choice
from autoquant.formats.moments import Moments
from autoquant.forward.flow import Flow, loop
from autoquant.measure.scorer import Scorer
from autoquant.model.binding import DenseSlot, ExpertsSlot
from autoquant.model.experts import ExpertsHook
from autoquant.model.live import QuantizedModel
from autoquant.plan.linears import LayerGroup, Linear
from autoquant.source.names import ROUTED_EXPERT

HELD_OUT_OF = 4
"""One sequence of so many is held out."""

MOST_BYTES_OF_A_SET = 1 << 30
"""Where the sums of all experts of a layer would take more, the layer's alone are kept: experts of
many channels see fewer tokens than channels, and lean on their layer in any case."""


def collect_moments(
    scorer: Scorer,
    split: Split,
    groups: Collection[LayerGroup],
    store: StatisticsStore,
    advance: Callable[[], None],
) -> None:
    """Keep the moments of the inputs of `groups`; those that are kept already are left alone.

    Args:
        scorer: all groups in BF16.
        split: the calibration tokens.
        groups: whose codes rest on their inputs.
        store: where each block's moments go when they are complete.
        advance: called after each stage of the model.
    """
    missing = {
        layer: own
        for layer, own in _by_layer(groups).items()
        if not store.has(layer, {linear.input_scale_set for g in own for linear in g.linears})
    }
    if not missing:
        return
    sequences = [row[None].to(scorer.device) for batch in split.batches for row in batch]
    collector = _Collector(scorer, sequences, missing, store, advance)
    loop(scorer.trunk, [collector])
    collector.finish()


def groups_with_moments(
    choices: Mapping[str, Collection[Choice]], groups: Collection[LayerGroup]
) -> tuple[LayerGroup, ...]:
    """The groups that some choice of theirs makes rest on moments of their inputs."""
    return tuple(
        group
        for group in groups
        if any(choice.format.needs_moments(choice) for choice in choices[group.name])
    )


def is_held_out(sequence: int) -> bool:
    """Whether a sequence of the split, counted from 0, is held out."""
    return sequence % HELD_OUT_OF == 1


def _by_layer(groups: Collection[LayerGroup]) -> dict[int | None, list[LayerGroup]]:
    found: dict[int | None, list[LayerGroup]] = {}
    for group in groups:
        found.setdefault(group.layer, []).append(group)
    return found


class _Collector:
    """The visitor that takes sequences through each stage and keeps what its weights multiply.

    Args:
        scorer: all groups in BF16.
        sequences: int64 [1, L] each.
        missing: groups of every layer whose moments are wanted.
        store: where each layer's go.
        advance: called after each stage.
    """

    def __init__(
        self,
        scorer: Scorer,
        sequences: Sequence[Tensor],
        missing: Mapping[int | None, Collection[LayerGroup]],
        store: StatisticsStore,
        advance: Callable[[], None],
    ) -> None:
        self._scorer, self._missing, self._store = scorer, missing, store
        self._advance = advance
        self._flows = [Flow(parts=(scorer.trunk.enter(own),)) for own in sequences]

    @torch.no_grad()
    def visit(self, stage: int) -> None:
        """Run the stage on every sequence, each alone."""
        trunk, room = self._scorer.trunk, self._scorer.room
        layers = [
            layer for layer in self._missing if layer is not None and trunk.stage_of(layer) == stage
        ]
        taps = [(layer, _Taps(self._scorer.quantized, self._missing[layer])) for layer in layers]
        with ExitStack() as installed:
            for _, own in taps:
                installed.enter_context(own.installed())
            for number, flow in enumerate(self._flows):
                for _, own in taps:
                    own.held_out = is_held_out(number)
                if stage == 0:
                    flow.begin()
                flow.advance(trunk, stage, room, len(self._flows))
        for layer, own in taps:
            self._store.write(layer, own.moments())
        self._advance()

    @torch.no_grad()
    def finish(self) -> None:
        """See what the head multiplies, behind all stages."""
        if None not in self._missing:
            return
        taps = _Taps(self._scorer.quantized, self._missing[None])
        for number, flow in enumerate(self._flows):
            taps.held_out = is_held_out(number)
            flow.finish(self._scorer.trunk, self._scorer.room)
            taps.see(self._scorer.trunk.head, flow.hidden)
        self._store.write(None, taps.moments())


@dataclass(slots=True)
class _Sums:
    """What one input set has shown so far."""

    sums: Tensor
    """float32 [2, M, K, K], or [2, 1, K, K] for all experts of a layer together."""
    tokens: list[list[int]]
    """[2, M]."""
    of_experts: bool

    @classmethod
    def zeros(cls, matrices: int | None, inputs: int, device: torch.device) -> "_Sums":
        size = matrices or 1
        kept = size if 8 * size * inputs**2 <= MOST_BYTES_OF_A_SET else 1
        sums = torch.zeros(2, kept, inputs, inputs, device=device)
        return cls(sums, [[0] * size, [0] * size], matrices is not None)

    @property
    def of_layer(self) -> bool:
        """Whether experts share their sums."""
        return self.sums.shape[1] < len(self.tokens[0])

    def add(self, rows: Tensor, part: int, matrix: int) -> None:
        """Add the products of rows [R, K] with themselves."""
        if len(rows):
            wide = rows.float()
            self.sums[part, 0 if self.of_layer else matrix].addmm_(wide.t(), wide)
            self.tokens[part][matrix] += len(rows)

    def moments(self) -> Moments:
        tokens = torch.tensor(self.tokens)
        if not self.of_experts:
            return Moments(sums=self.sums, tokens=tokens)
        if self.of_layer:
            return Moments(
                sums=self.sums[:, :0],
                tokens=tokens,
                layer_sums=self.sums[:, 0],
                layer_tokens=tokens.sum(dim=1),
            )
        finite = self.sums.isfinite().flatten(2).all(dim=2)[:, :, None, None]
        return Moments(
            sums=self.sums,
            tokens=tokens,
            layer_sums=self.sums.where(finite, 0.0).sum(dim=1),
            layer_tokens=tokens.where(finite[:, :, 0, 0].cpu(), 0).sum(dim=1),
        )


class _Taps:
    """Sees what the weights of some groups multiply.

    Args:
        quantized: all groups in BF16.
        groups: of one block.
    """

    def __init__(self, quantized: QuantizedModel, groups: Collection[LayerGroup]) -> None:
        self.held_out = False
        self._quantized = quantized
        self._dense: dict[Any, tuple[str, int]] = {}
        """Input set and matrix of one linear for each."""
        self._sums: dict[str, _Sums] = {}
        names = {group.name for group in groups}
        slots = [slot for group, slot in quantized.slots if group.name in names]
        self._stacks = [slot for slot in slots if isinstance(slot, ExpertsSlot)]
        for slot in self._stacks:
            for part, linears in slot.products.items():
                self._begin(slot.input_set[part], linears[0], slot.module, slot.module.num_experts)
        self._watch_dense([slot for slot in slots if isinstance(slot, DenseSlot)])

    @contextmanager
    def installed(self) -> Iterator[None]:
        """See the forwards inside."""
        replaced: list[tuple[Any, str, Any]] = []
        try:
            for module in self._dense:
                replaced.append((module, "forward", module.forward))
                module.forward = _DenseTap(self, module, module.forward)
            for slot in self._stacks:
                hook = slot.module.autoquant_hook
                replaced.append((slot.module, "autoquant_hook", hook))
                slot.module.autoquant_hook = _ExpertsTap(self, slot, hook)
            yield
        finally:
            for module, name, original in reversed(replaced):
                setattr(module, name, original)
            self._quantized.forget_inputs()

    def see(self, module: Any, x: Tensor) -> None:
        """Add an input [..., K] of a linear."""
        name, matrix = self._dense[module]
        self.add(name, x.flatten(0, -2), matrix)

    def add(self, name: str, rows: Tensor, matrix: int) -> None:
        """Add rows [R, K] to what an input set has shown one of its matrices."""
        self._sums[name].add(rows, int(self.held_out), matrix)

    def moments(self) -> dict[str, Moments]:
        """Of every input set."""
        return {name: own.moments() for name, own in self._sums.items()}

    def _watch_dense(self, slots: Collection[DenseSlot]) -> None:
        """Watch one linear of each input set, and of each expert where experts are modules."""
        matches = [ROUTED_EXPERT.fullmatch(slot.linears[0].name) for slot in slots]
        indices = [int(match["index"]) if match else None for match in matches]
        watched: set[tuple[str, int | None]] = set()
        for slot, index in zip(slots, indices, strict=True):
            name = slot.input_scale_set
            if (name, index) in watched:
                continue
            watched.add((name, index))
            self._dense[slot.module] = name, index or 0
            experts = None if index is None else 1 + max(i for i in indices if i is not None)
            if name not in self._sums:
                self._begin(name, slot.linears[0], slot.module, experts)

    def _begin(self, name: str, linear: Linear, module: Any, experts: int | None) -> None:
        device = next(module.parameters()).device
        self._sums[name] = _Sums.zeros(experts, linear.in_features, device)


class _DenseTap:
    """Stands in for the forward of one linear."""

    def __init__(self, taps: _Taps, module: Any, forward: Callable[[Tensor], Tensor]) -> None:
        self._taps, self._module, self._forward = taps, module, forward

    def __call__(self, x: Tensor) -> Tensor:
        self._taps.see(self._module, x)
        return self._forward(x)


class _ExpertsTap(ExpertsHook):
    """Stands before the hook that quantizes the operands of a block's experts."""

    def __init__(self, taps: _Taps, slot: ExpertsSlot, inner: ExpertsHook) -> None:
        self._taps, self._sets, self._inner = taps, slot.input_set, inner

    def routed(self, counts: Tensor, tokens: Tensor) -> None:
        self._inner.routed(counts, tokens)

    def input(self, part: str, rows: Tensor) -> Tensor:
        return self._inner.input(part, rows)

    def weight(self, part: str, weight: Tensor) -> Tensor:
        return self._inner.weight(part, weight)

    def product(self, part: str, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        for expert, own in enumerate(rows.split(counts.tolist())):
            self._taps.add(self._sets[part], own, expert)
        return self._inner.product(part, rows, weight, counts)
