"""How much rows count in second moments: by the gradient of what the model says at their products.

To second order an error D of a weight costs KL = 1/2 E[(g^T D x)^2] for an input x, with g the
gradient at the product of <v, logits> and v random, of the covariance that `gradient.py` names. So
rows at which g is large deserve more. A row has the weight |g|, g over all weights that read it:
|g|^2 was no better where both were measured, and lets fewer rows speak. It is the tokens that later
ones attend to that gain: of SmolLM2-135M, g at the values of a sequence's first token is 71 times
the mean, at its keys 21 times, and without weights it is one row among many.

Shapes: R rows, N outputs.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from autoquant.codes.row_weights import RowWeights, Squares
from autoquant.codes.statistics import StatisticsStore
from autoquant.forward.backward import Backward
from autoquant.forward.flow import Flow, loop, walk
from autoquant.measure.gradient import NoGradient, backward_passes, random_pull
from autoquant.measure.scorer import Scorer
from autoquant.measure.statistics.chunks import Chunk, states_bytes
from autoquant.measure.statistics.output_taps import OutputTaps
from autoquant.plan.linears import LayerGroup

SEED = 0
"""Of the random vectors."""

ByLayer = Mapping[int | None, Sequence[LayerGroup]]


def row_weights(
    scorer: Scorer,
    chunks: Sequence[Chunk],
    groups: Collection[LayerGroup],
    store: StatisticsStore,
    advance: Callable[[], None],
) -> dict[str, RowWeights]:
    """Weights of the rows that groups multiply, by input set: those kept, else found and kept.

    Those of a set that is left out count alike: no gradient reaches it, or none reaches any.

    Args:
        scorer: all groups in BF16.
        chunks: all sequences.
        groups: whose inputs are weighed.
        store: where the weights are.
        advance: called after each chunk that is weighed.
    """
    sets = input_sets(groups)
    found = store.rows(sets)
    if found is not None:
        return found
    try:
        found = weigh_rows(scorer, chunks, by_layer(groups), advance)
    except NoGradient as error:
        store.count_alike(str(error))
        return {}
    store.write_rows(found, sets)
    return found


def weigh_rows(
    scorer: Scorer, chunks: Sequence[Chunk], groups: ByLayer, advance: Callable[[], None]
) -> dict[str, RowWeights]:
    """Weights of the rows of each input set; sets that no gradient reaches are left out.

    Args:
        scorer: all groups in BF16.
        chunks: all sequences.
        groups: of every layer, whose inputs are weighed.
        advance: called after each chunk.

    Raises:
        NoGradient: an architecture or a kernel without a backward pass.
    """
    sizes = Sizes(sum(len(own.tokens) for own in chunks))
    states = scorer.trunk.stages * max(states_bytes(scorer, [own]) for own in chunks)
    for wave in scorer.room.waves(range(len(chunks)), states):
        own = [chunks[index] for index in wave]
        flows = [chunk.flow(scorer, keep=True) for chunk in own]
        walk(scorer.trunk, scorer.quantized, scorer.room, flows)
        with backward_passes():
            loop(scorer.trunk, [Weigher(scorer, own, flows, groups, sizes)], backwards=True)
        for _ in wave:
            advance()
    return sizes.weights()


class Sizes:
    """Squared norms of gradients, of each input set, sequence and matrix.

    Args:
        sequences: how many there are.
    """

    def __init__(self, sequences: int) -> None:
        self._nothing: list[Squares] = [(torch.zeros(0), ())] * sequences
        self._known: dict[str, list[Squares]] = {}
        self._coming: dict[tuple[str, int], dict[int, Tensor]] = {}
        """Of the stage at hand, by set and sequence."""

    def add(self, name: str, sequence: int, matrix: int, squares: Tensor) -> None:
        """Add those [R] of one weight at the rows of one sequence."""
        own = self._coming.setdefault((name, sequence), {})
        before = own.get(matrix)
        if before is None:
            own[matrix] = squares
        elif len(before) == len(squares):
            own[matrix] = before + squares

    def settle(self) -> None:
        """Put together what came of a stage: tensors of the rows of single experts are many."""
        for (name, sequence), own in self._coming.items():
            parts = [own.get(matrix, torch.zeros(0)) for matrix in range(1 + max(own))]
            found = torch.cat(parts), tuple(map(len, parts))
            self._known.setdefault(name, [*self._nothing])[sequence] = found
        self._coming.clear()

    def weights(self) -> dict[str, RowWeights]:
        """Of all input sets that gradients reach, as far as all sequences have been there."""
        found = {name: self.of(name) for name in self._known}
        return {name: own for name, own in found.items() if own is not None}

    def of(self, name: str) -> RowWeights | None:
        """Of one input set."""
        return RowWeights.of_squares(self._known.get(name, ()))


class Weigher:
    """The visitor that takes gradients back through each stage, and adds up their sizes.

    Args:
        scorer: all groups in BF16.
        chunks: of sequences.
        flows: the forward of each at its end, with its states kept.
        groups: of every layer.
        sizes: where they are added.
    """

    def __init__(
        self,
        scorer: Scorer,
        chunks: Sequence[Chunk],
        flows: Sequence[Flow],
        groups: ByLayer,
        sizes: Sizes,
    ) -> None:
        self._scorer, self._groups, self._sizes = scorer, groups, sizes
        self._chunk = chunks[0]
        """What is in the stage."""
        self._backs = [
            (chunk, self._backward(flow, random_pull(scorer, SEED, chunk.first)))
            for chunk, flow in zip(chunks, flows, strict=True)
        ]

    def visit(self, stage: int) -> None:
        """Compute the stage again for every chunk, and its gradients."""
        layers = layers_at(self._groups, self._scorer, stage)
        groups = [group for layer in layers for group in self._groups[layer]]
        with OutputTaps(self._scorer.quantized, groups, self._see).installed():
            for chunk, back in self._backs:
                self._chunk = chunk
                back.visit(stage)
        self._sizes.settle()

    def _backward(self, flow: Flow, pull: Callable[[Tensor], Tensor]) -> Backward:
        return Backward(
            self._scorer.trunk, self._scorer.room, flow, [flow.parts], [nullcontext], pull
        )

    def _see(self, name: str, matrix: int, gradient: Tensor, tokens: Tensor | None) -> None:
        """Add the sizes of gradients [R, N] at the products of one matrix."""
        sizes = self._chunk.sizes(len(gradient), tokens)
        squares = gradient.float().square().sum(dim=1).cpu()
        for number, own in enumerate(squares.split(sizes), self._chunk.first):
            self._sizes.add(name, number, matrix, own)


def by_layer(groups: Iterable[LayerGroup]) -> dict[int | None, list[LayerGroup]]:
    """Groups of each block, and of none."""
    found: dict[int | None, list[LayerGroup]] = {}
    for group in groups:
        found.setdefault(group.layer, []).append(group)
    return found


def input_sets(groups: Iterable[LayerGroup]) -> set[str]:
    """What groups multiply."""
    return {name for group in groups for name in group.input_sets}


def layers_at(
    groups: Mapping[int | None, Collection[LayerGroup]], scorer: Scorer, stage: int
) -> list[int]:
    """The layers of a stage among those of groups."""
    stage_of = scorer.trunk.stage_of
    return [layer for layer in groups if layer is not None and stage_of(layer) == stage]
