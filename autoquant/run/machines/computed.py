"""What the parts of a search compute, counted before it begins."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Self

from autoquant.formats import BF16, Choice
from autoquant.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """Of one part. A forward is one of a batch through all blocks."""

    observed: float = 0.0
    """Forwards of the BF16 model whose inputs are looked at."""
    forwards: float = 0.0
    """Other forwards of the BF16 model."""
    candidates: float = 0.0
    """Forwards under quantized choices."""
    backwards: float = 0.0
    """Of a batch, with the products of every choice."""
    summed: float = 0.0
    """Forwards whose inputs' second moments are summed."""
    weighed: float = 0.0
    """Of a batch, with the size of gradients at products."""
    referred: float = 0.0
    """Batches of which the BF16 model's logits are computed."""
    probed: float = 0.0
    """Batches whose logits are compared with the BF16 model's, with a sketch of their change."""
    compared: float = 0.0
    """The same without one."""
    scored: float = 0.0
    """The same with agreement and likelihoods."""
    encoded: float = 0.0
    """How often a choice of every group is encoded from the weight alone."""
    fitted: float = 0.0
    """How often one is fitted to moments of inputs."""

    def __add__(self, other: "Computed") -> Self:
        names = (field.name for field in fields(self))
        return type(self)(**{n: getattr(self, n) + getattr(other, n) for n in names})


NOTHING = Computed()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoicesOfGroups:
    """How many choices a group has to be encoded in, the mean by elements."""

    plain: float
    """From the weight alone."""
    fitted: float
    """To moments of inputs."""

    @classmethod
    def of(cls, plan: Plan) -> Self:
        elements = {group.name: group.elements for group in plan.groups}
        choices = plan.options.choices
        fitted = {name: _count(own, is_fitted=True) for name, own in choices.items()}
        plain = {name: _count(own, is_fitted=False) for name, own in choices.items()}
        return cls(plain=_mean(plain, elements), fitted=_mean(fitted, elements))


def _count(choices: Collection[Choice], *, is_fitted: bool) -> int:
    """Ways to encode a weight: inputs are no matter of it."""
    ways = {choice.of_weight for choice in choices if choice != BF16}
    return sum(way.format.is_costly(way) == is_fitted for way in ways)


def _mean(counts: Mapping[str, int], elements: Mapping[str, int]) -> float:
    total = sum(elements[name] for name in counts)
    return sum(count * elements[name] for name, count in counts.items()) / max(1, total)
