"""The costs that follow from a model alone: stored bytes, active bytes, multiply-adds in BF16.

Of a layer's routed experts a token reads and multiplies with top-k of E, of the embeddings it reads
one row unless they are the output head too, of all else everything.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from functools import cached_property
from typing import Any

from autoquant.formats import A16, Choice
from autoquant.plan.accounting import BYTE_BITS
from autoquant.plan.budget import Scope
from autoquant.plan.cost import Cost, Unit
from autoquant.plan.grouping import Groups
from autoquant.plan.linears import LayerGroup
from autoquant.source.names import WORD_EMBEDDINGS, Fixed

EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token"),
    *("moe_top_k", "moe_k", "top_k_experts"),
)
"""The names that configurations give to E and to top-k."""


class CostKind(StrEnum):
    """The costs of this module, by the names of settings and results."""

    BITS = "bits"
    """Stored bits."""
    ACTIVE_BYTES = "active-bytes"
    """Bytes that one token reads."""
    BF16_PRODUCTS = "bf16-products"
    """Multiply-adds with BF16 inputs."""
    A16_PRODUCTS = "a16-products"
    """Those of them whose weights are quantized and whose inputs could be."""


@dataclass(frozen=True, kw_only=True)
class StoredBytes(Cost):
    """Bytes of every tensor that the checkpoint stores, stated in bits per element."""

    @property
    def name(self) -> str:
        return CostKind.BITS

    @property
    def unit(self) -> Unit:
        is_whole = self.scope is Scope.CHECKPOINT
        return Unit(
            name=f"bits per element{'' if is_whole else ' of the searched layers'}",
            short="bits",
            is_bpe=is_whole,
            one=Fraction(self.elements, BYTE_BITS),
            uncounted=self.uncounted,
        )

    @cached_property
    def shares(self) -> Mapping[str, Fraction]:
        """Share of a group or a fixed tensor that counts, by name; all of it unless named.

        Bytes of a share are rounded up.
        """
        return {}

    def of(self, group: str, choice: Choice) -> int:
        """Bytes of every tensor that the group stores under `choice`."""
        return self._counted(group, self.accounting.group_bytes(group, choice))

    @cached_property
    def fixed_parts(self) -> Mapping[str, int]:
        """Bytes of the tensors that belong to no group, by the reason why they are fixed."""
        headers, parts = self.accounting.headers, Counter[str]()
        for tensor in self.accounting.groups.fixed:
            header = headers[tensor.name]
            counted = self._counted(tensor.name, header.bytes)
            parts[f"{tensor.reason} fixed at {header.dtype}"] += counted
        parts["scales of the cache of keys and values"] = self.accounting.added_bytes
        return parts

    @cached_property
    def elements(self) -> int:
        """Elements that the unit counts."""
        accounting = self.accounting
        searched = sum(self._counted(n, accounting.groups[n].elements) for n in accounting.searched)
        if self.scope is Scope.SEARCHED:
            return searched
        closed = (g for g in accounting.groups if g.name not in accounting.searched)
        fixed = (accounting.headers[tensor.name] for tensor in accounting.groups.fixed)
        return (
            searched
            + sum(self._counted(group.name, group.elements) for group in closed)
            + sum(self._counted(tensor.name, tensor.elements) for tensor in fixed)
        )

    def _counted(self, name: str, size: int) -> int:
        return math.ceil(size * self.shares[name]) if name in self.shares else size


@dataclass(frozen=True, kw_only=True)
class ActiveBytes(StoredBytes):
    """Bytes that one token reads, stated in bits per element that it reads.

    Args:
        text_config: of the language model; without numbers of experts every expert is read.
    """

    text_config: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return CostKind.ACTIVE_BYTES

    @property
    def unit(self) -> Unit:
        unit = super().unit
        return replace(
            unit, name=f"active {unit.name}", meaning="those that one token reads", is_bpe=False
        )

    @cached_property
    def shares(self) -> Mapping[str, Fraction]:
        groups = self.accounting.groups
        heads = embeddings_that_are_heads(groups)
        rows = {
            tensor.name: Fraction(0)
            for tensor in groups.fixed
            if tensor.reason is Fixed.EMBEDDING and tensor.name not in heads
        }
        return rows | {group.name: share_of_token(group, self.text_config) for group in groups}


@dataclass(frozen=True, kw_only=True)
class Bf16Products(Cost):
    """Multiply-adds per token whose inputs are BF16, as a share of those of the searched layers.

    Args:
        text_config: of the language model; without numbers of experts a token takes every expert.
    """

    scope: Scope = Scope.SEARCHED
    text_config: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return CostKind.BF16_PRODUCTS

    @property
    def unit(self) -> Unit:
        counted = [
            group
            for group in self.accounting.groups
            if self.scope is Scope.CHECKPOINT or group.name in self.accounting.searched
        ]
        of = " of the searched layers" if self.scope is Scope.SEARCHED else ""
        return Unit(
            name=f"BF16 multiply-adds per multiply-add{of}",
            short="",
            meaning="those whose inputs are BF16",
            one=Fraction(sum(map(self._products, counted))),
            uncounted=self.uncounted,
        )

    def of(self, group: str, choice: Choice) -> int:
        """Multiply-adds of the group per token if `choice` leaves its inputs in BF16, or none."""
        return self._products(self.accounting.groups[group]) if self._counts(choice) else 0

    def _counts(self, choice: Choice) -> bool:
        return choice.keeps_input

    def _products(self, group: LayerGroup) -> int:
        return math.ceil(group.elements * share_of_token(group, self.text_config))


@dataclass(frozen=True, kw_only=True)
class A16Products(Bf16Products):
    """Multiply-adds per token of quantized weights whose inputs stay in BF16 by choice."""

    @property
    def name(self) -> str:
        return CostKind.A16_PRODUCTS

    @property
    def unit(self) -> Unit:
        return replace(
            super().unit,
            name="multiply-adds with inputs left in BF16 per multiply-add of the searched layers",
            meaning="those of quantized weights",
        )

    def _counts(self, choice: Choice) -> bool:
        return choice.input == A16


def share_of_token(group: LayerGroup, text_config: Mapping[str, Any]) -> Fraction:
    """Share of the group's elements that one token meets: routed experts by top-k of E."""
    if group.role != "experts":
        return Fraction(1)
    shared = sum(linear.elements for linear in group.linears if "shared" in linear.name)
    always = Fraction(shared, group.elements)
    return always + (1 - always) * _routed_share(text_config)


def embeddings_that_are_heads(groups: Groups) -> frozenset[str]:
    """Names of embeddings that the output head reads whole: those of a checkpoint without a head.

    A head that is stored although it is tied counts itself.
    """
    has_head = any(group.role == "head" for group in groups)
    if has_head or any(tensor.reason is Fixed.TIED_HEAD for tensor in groups.fixed):
        return frozenset()
    embeddings = (t.name for t in groups.fixed if t.reason is Fixed.EMBEDDING)
    return frozenset(
        name
        for name in embeddings
        if WORD_EMBEDDINGS.fullmatch(name.removesuffix(".weight").rpartition(".")[2])
    )


def _routed_share(text_config: Mapping[str, Any]) -> Fraction:
    experts = next((text_config[k] for k in EXPERTS if text_config.get(k)), None)
    active = next((text_config[k] for k in EXPERTS_PER_TOKEN if text_config.get(k)), None)
    return Fraction(int(active), int(experts)) if experts and active else Fraction(1)
