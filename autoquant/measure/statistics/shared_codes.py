"""Codes that cost much to make, each made by one rank and read by the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoquant.codes.book import CodeBook
from autoquant.formats import Choice
from autoquant.forward.flow import loop
from autoquant.forward.trunk import Trunk
from autoquant.measure.ranks.together import together
from autoquant.measure.scorer import Scorer
from autoquant.plan.linears import LayerGroup

Key = tuple[str, Choice]


def share_codes(scorer: Scorer, choices: Mapping[str, Sequence[Choice]]) -> None:
    """Let the ranks make the costly codes of all open choices, where they all see one folder.

    A process alone makes each when it is first needed.

    Args:
        scorer: with its statistics collected.
        choices: of each group.
    """
    if scorer.ranks.size == 1:
        return
    costly = {
        (group.name, choice.of_weight): None
        for group in scorer.quantized.groups
        for choice in choices[group.name]
        if choice.format.is_costly(choice)
    }
    if costly:
        _make(scorer, list(costly))


@together
def _make(scorer: Scorer, keys: Sequence[Key]) -> None:
    """Each rank makes its share and leaves it for the others."""
    book, groups = scorer.quantized.book, {group.name: group for group in scorer.quantized.groups}
    dealt = [(groups[name], choice) for name, choice in scorer.ranks.dealt(keys)]

    def make() -> None:
        maker = _Maker(scorer.trunk, book, dealt)
        loop(scorer.trunk, [maker])
        maker.visit(scorer.trunk.stages)

    scorer.ranks.own(make)


@dataclass(frozen=True)
class _Maker:
    """The visitor that makes the codes of each stage's weights."""

    trunk: Trunk
    book: CodeBook
    keys: Sequence[tuple[LayerGroup, Choice]]

    def visit(self, stage: int) -> None:
        """Make what is not there; behind the last stage those of the head."""
        for group, choice in self.keys:
            if self.trunk.stage_of(group.layer) == stage and not self.book.has(group, choice):
                self.book.plain(group, choice)
