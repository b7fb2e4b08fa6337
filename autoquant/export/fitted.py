"""Linears of a checkpoint with codes fitted to inputs: how it names them, what must hold of them.

Compensated codes are not the nearest to the source. What must hold of all fitted codes is that they
do no more harm to the product with the inputs that they were fitted to than codes of the weight
alone.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoquant.codes.book import CodeBook
from autoquant.codes.cache import CodeCache
from autoquant.codes.statistics import StatisticsStore
from autoquant.codes.weights import Unit
from autoquant.errors import AutoQuantError, SourceError
from autoquant.formats import REFIT, Choice
from autoquant.formats.packed import Packed
from autoquant.formats.rounded import harm
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import Groups
from autoquant.store.run_directory import CODES as CODES_FOLDER
from autoquant.store.run_directory import STATISTICS, home_of

FITTED, POLISH = "fitted", "polish"
"""Keys of what a checkpoint says of itself: linears by choice, and what names refitted codes."""

_SLACK = 1 + 2.0**-10
"""Room for sums in another order."""


def fitted_linears(groups: Groups, assignment: Assignment, book: CodeBook) -> dict[str, list[str]]:
    """The linears with fitted codes by their choice, as a checkpoint names them."""
    found: dict[str, list[str]] = {}
    for group in groups:
        choice = assignment[group.name].of_weight
        if choice.format.needs_moments(choice):
            plain = book.plain(group, choice)
            names = [linear.name for linear in group.linears if linear.name not in plain]
            found.setdefault(str(choice), []).extend(names)
    return {choice: names for choice, names in found.items() if names}


def said_of_codes(groups: Groups, assignment: Assignment, book: CodeBook) -> dict[str, Any]:
    """What a checkpoint says of its fitted codes; nothing without any."""
    found = fitted_linears(groups, assignment, book)
    if not found:
        return {}
    is_refitted = any(choice.rounding == REFIT for _, choice in assignment)
    return {FITTED: found} | ({POLISH: book.polish} if is_refitted else {})


def read_fitted(said: object) -> dict[str, Choice]:
    """The choice of every linear that `fitted_linears` named; none of anything else."""
    if not isinstance(said, dict):
        return {}
    found: dict[str, Choice] = {}
    for text, names in said.items():
        try:
            choice = Choice.parse(text)
        except AutoQuantError:
            continue
        if isinstance(names, list) and choice.format.needs_moments(choice):
            found |= dict.fromkeys(map(str, names), choice)
    return found


class FittedCheck:
    """Holds fitted codes against what the run that made them keeps beside its checkpoint.

    Those of the run's cache must be the checkpoint's to the bit, and none may do more harm to the
    inputs that it was fitted to than codes of the weight alone. Refitted codes were judged so when
    they were made, by inputs behind quantized blocks, which nothing keeps.

    Args:
        run: where the checkpoint lies.
        said: what the checkpoint says of itself.
        groups: of the checkpoint.
        made_from: digest of the source.
    """

    def __init__(self, run: Path, said: Mapping[str, Any], groups: Groups, made_from: str) -> None:
        self.choices = read_fitted(said.get(FITTED))
        home = home_of(run)
        self._statistics = StatisticsStore(home / STATISTICS)
        self._cache = CodeCache(home / CODES_FOLDER, made_from=made_from, most_bytes=0)
        self._polish = said.get(POLISH)
        self._linears = {own.name: (group, own) for group in groups for own in group.linears}
        self._judged = self._kept = 0

    def problems(self, weight: Tensor, packed: Packed, name: str) -> Iterator[str]:
        """What is wrong with the codes of a linear [N, K] that is one of `choices`."""
        choice = self.choices[name]
        yield from self._other_codes(packed, choice, name)
        if choice.rounding != REFIT:
            yield from self._harm(weight, packed, choice, name)

    def notes(self) -> Iterator[str]:
        """What to say of them."""
        if self.choices:
            yield (
                f"{len(self.choices)} linears have codes that were fitted to inputs; "
                f"{self._judged} of them were held against the statistics of these, and "
                f"{self._kept} against the codes that their search kept. Both lie beside a "
                "checkpoint in its run directory."
            )

    def _other_codes(self, packed: Packed, choice: Choice, name: str) -> Iterator[str]:
        group, _ = self._linears[name]
        if choice.rounding == REFIT:
            digest = self._polish
        else:
            digest = self._statistics.digest(group.layer, group.input_sets)
        kept = self._cache.read(group.name, choice, str(digest), [name])
        if kept is None:
            return
        self._kept += 1
        ours, theirs = _of_rows(packed), _of_rows(kept.packed[name])
        if not all(_same_bits(part, theirs[name]) for name, part in ours.items()):
            yield f"{name}: its codes are not those that its search measured and kept."

    def _harm(self, weight: Tensor, packed: Packed, choice: Choice, name: str) -> Iterator[str]:
        group, linear = self._linears[name]
        try:
            moments = self._statistics.moments(
                Unit(name=name, layer=group.layer, matrices=((linear,),))
            )
        except SourceError:
            return
        coder = choice.format.coder(choice, packed.parts[choice.format.tensor_scale].view(1))
        stored = {part: own[None] for part, own in _of_rows(packed).items()}
        ours, theirs = (
            harm(weight[None], coder.decode(own), moments.mean(), [len(weight)]).item()
            for own in (stored, coder.plain(weight[None]))
        )
        self._judged += 1
        if not ours <= theirs * _SLACK:
            yield (
                f"{name}: its codes do {ours / theirs:.3f} times the harm of the nearest ones to "
                "the inputs that they were fitted to."
            )


def _of_rows(packed: Packed) -> dict[str, Tensor]:
    """The parts that each row has its own of: codes, and scales of blocks."""
    return {name: part for name, part in packed.parts.items() if part.ndim}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
