"""Scores assignments on a split: the pure call `score(assignment) -> TokenScores`.

The BF16 model's final hidden states are kept instead of its logits (H numbers a token where the
vocabulary needs V), and logits of both models are formed in float32 from the BF16 operands, a
tile of tokens at a time, so that the head's output rounding is not charged to any candidate.

Shapes: B sequences, L tokens, H hidden, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from autoquant.assignment import Assignment
from autoquant.data.tokens import Split
from autoquant.errors import SourceError
from autoquant.formats import Choice
from autoquant.model.quantized import QuantizedModel
from autoquant.scoring.forward import Boundaries, Trunk
from autoquant.scoring.kl import TokenScores, compare_tile

TILE_BYTES = 1 << 28
"""Size of one float32 logit tile; a tile of each model is alive at a time."""


@dataclass(frozen=True, slots=True)
class _Reference:
    tokens: torch.Tensor
    hidden: torch.Tensor
    """[B, L, H] of the BF16 model."""


class Scorer:
    """Measures candidates of one model.

    Args:
        quantized: the live model.
        device: where tokens go.

    Raises:
        SourceError: the model transforms its logits after the head in a way that is not a plain
            linear map, so hidden states do not determine them.
    """

    def __init__(self, quantized: QuantizedModel, device: torch.device) -> None:
        self.quantized = quantized
        self.device = device
        self.trunk = Trunk(quantized.model)
        self._references: dict[tuple[str, int], _Reference] = {}

    @property
    def blocks(self) -> int:
        return len(self.trunk.blocks)

    def score(self, assignment: Assignment, split: Split) -> TokenScores:
        """Measure a whole assignment on every token of the split."""
        return gather(self.score_batch(assignment, split, i) for i in range(len(split.batches)))

    def score_batch(self, assignment: Assignment, split: Split, index: int) -> TokenScores:
        """Measure a whole assignment on one batch of the split."""
        reference = self.reference(split, index)
        self.quantized.apply(assignment)
        try:
            hidden = self.trunk.hidden(reference.tokens)
            return self._compare(reference, hidden)
        finally:
            self._to_bf16()

    def probe_batch(
        self, split: Split, index: int, probes: Iterable[tuple[str, Choice, int]]
    ) -> Iterator[TokenScores]:
        """Measure single groups on one batch, each alone in its format, the rest in BF16.

        Args:
            split: the tokens.
            index: batch of the split.
            probes: (group, choice, block that the group is in); blocks before it are not run.
        """
        tokens = split.batches[index].to(self.device)
        hidden, boundaries = self.trunk.record(tokens)
        reference = _Reference(tokens, hidden)
        for group, choice, block in probes:
            yield self._probe(reference, boundaries, {group: choice}, block)

    def noise_batch(self, split: Split, index: int) -> TokenScores:
        """KL between two BF16 runs of one batch that differ only in how it is cut."""
        reference = self.reference(split, index)
        parts = [self.trunk.hidden(row) for row in reference.tokens.split(1)]
        return self._compare(reference, torch.cat(parts))

    def reference(self, split: Split, index: int) -> _Reference:
        """The BF16 model's hidden states on a batch, computed once."""
        key = (split.digest, index)
        if key not in self._references:
            self._to_bf16()
            tokens = split.batches[index].to(self.device)
            self._references[key] = _Reference(tokens, self.trunk.hidden(tokens))
        return self._references[key]

    def forget(self, split: Split) -> None:
        """Give back the memory of a split's reference states."""
        for index in range(len(split.batches)):
            self._references.pop((split.digest, index), None)

    def check_head(self, split: Split) -> None:
        """Verify on one sequence that logits are the head applied to the final hidden states.

        Raises:
            SourceError: they are not (a soft cap or a scale after the head).
        """
        self._to_bf16()
        tokens = split.batches[0][:1].to(self.device)
        with torch.inference_mode():
            actual = self.quantized.model(input_ids=tokens, use_cache=False).logits
            expected = self.trunk.head(self.trunk.hidden(tokens))
        if not torch.equal(actual, expected):
            raise SourceError(
                f"{type(self.quantized.model).__name__} changes its logits after the head, which "
                "scoring from hidden states would miss.",
                fix="this architecture is not supported yet.",
            )

    def _probe(
        self,
        reference: _Reference,
        boundaries: Boundaries,
        choices: Mapping[str, Choice],
        block: int,
    ) -> TokenScores:
        self.trunk.reuse(boundaries)
        self.quantized.choose(choices)
        try:
            if block >= self.blocks > 0:
                return self._compare(reference, reference.hidden)
            return self._compare(reference, self.trunk.hidden(reference.tokens, start=block))
        finally:
            self._to_bf16()

    def _to_bf16(self) -> None:
        self.quantized.choose({})
        self.quantized.forget_inputs()

    @torch.inference_mode()
    def _compare(self, reference: _Reference, hidden: torch.Tensor) -> TokenScores:
        """Compare hidden states [B, L, H]; the head is quantized if the current choices say so."""
        rows, length = reference.tokens.shape
        labels = torch.full_like(reference.tokens, -1)
        labels[:, :-1] = reference.tokens[:, 1:]
        ours, theirs = hidden.flatten(0, 1), reference.hidden.flatten(0, 1)
        head = self.trunk.head
        tile = max(1, TILE_BYTES // (4 * head.weight.shape[0]))
        parts: dict[str, list[torch.Tensor]] = {}
        for start in range(0, rows * length, tile):
            span = slice(start, start + tile)
            scores = compare_tile(
                self._logits(theirs[span], head.weight),
                self._logits(*self.quantized.operands(head, ours[span])),
                labels.flatten()[span],
            )
            for name, values in scores.items():
                parts.setdefault(name, []).append(values)
        joined = {name: torch.cat(values).cpu().numpy() for name, values in parts.items()}
        return TokenScores(sequence=np.repeat(np.arange(rows), length), **joined)

    def _logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Float32 logits [T, V] of hidden states [T, H] under a head weight [V, H]."""
        bias = self.trunk.head.bias
        if hidden.is_cuda:
            logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        else:
            logits = torch.mm(hidden.float(), weight.float().t())
        return logits if bias is None else logits + bias.float()


def gather(batches: Iterable[TokenScores]) -> TokenScores:
    """Join the scores of consecutive batches, sequences renumbered."""
    parts = list(batches)
    offsets = np.cumsum([0] + [int(part.sequence[-1]) + 1 for part in parts[:-1]])
    return TokenScores(
        kl=np.concatenate([part.kl for part in parts]),
        agrees=np.concatenate([part.agrees for part in parts]),
        nll_reference=np.concatenate([part.nll_reference for part in parts]),
        nll=np.concatenate([part.nll for part in parts]),
        sequence=np.concatenate(
            [part.sequence + offset for part, offset in zip(parts, offsets, strict=True)]
        ),
    )
