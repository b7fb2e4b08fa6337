"""What a mixture of experts reads for one token, the cost that decides its speed at small batches.

Of a layer's routed experts a token reads top-k of E, of the embeddings one row, of all else
everything (the objective that NVIDIA's own case study found better than stored bytes).
"""

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from fractions import Fraction
from typing import Any

from autoquant.plan.budget import Accounting
from autoquant.plan.linears import LayerGroup
from autoquant.source.names import Fixed

EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token"),
    *("moe_top_k", "moe_k", "top_k_experts"),
)
"""The names that configurations give to E and to top-k."""


class Cost(StrEnum):
    """What a budget limits."""

    BITS = "bits"
    """Stored bits."""
    ACTIVE_BYTES = "active-bytes"
    """Bits that one token reads."""


def charged(accounting: Accounting, cost: Cost, text_config: Mapping[str, Any]) -> Accounting:
    """The accounting of what `cost` counts, elements and bytes alike.

    Args:
        accounting: of the whole checkpoint.
        cost: stored bits change nothing.
        text_config: of the language model; without numbers of experts every expert is read.
    """
    if cost is Cost.BITS:
        return accounting
    routed = _routed_share(text_config)
    shares = {
        tensor.name: Fraction(0)
        for tensor in accounting.groups.fixed
        if tensor.reason is Fixed.EMBEDDING
    }
    for group in accounting.groups:
        if group.role == "experts" and routed < 1:
            always = Fraction(_shared_elements(group), group.elements)
            shares[group.name] = always + (1 - always) * routed
    return replace(accounting, shares=shares)


def _routed_share(text_config: Mapping[str, Any]) -> Fraction:
    experts = next((text_config[k] for k in EXPERTS if text_config.get(k)), None)
    active = next((text_config[k] for k in EXPERTS_PER_TOKEN if text_config.get(k)), None)
    return Fraction(int(active), int(experts)) if experts and active else Fraction(1)


def _shared_elements(group: LayerGroup) -> int:
    """Elements of the shared experts that the group holds beside its routed ones."""
    return sum(linear.elements for linear in group.linears if "shared" in linear.name)
