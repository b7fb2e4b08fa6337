"""Mixture-of-experts forward over 3-D expert parameters, with a place for quantization.

transformers keeps the experts of a block as `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]` and
dispatches their forward by name. Registering our own makes every architecture that uses that
mechanism run the code below, so that no kernel bypasses the fake quantization.

Shapes: T tokens, R = T * top-k routed rows sorted by expert, E experts, H hidden, I expert width.
"""

from collections.abc import Callable
from typing import Any

import torch

from autoquant.errors import SourceError
from autoquant.model import products

IMPLEMENTATION = "autoquant"
"""Value of `config._experts_implementation` that selects `experts_forward`."""

WIDE, DOWN = "wide", "down"
"""The two products of an expert: gate and up (or up alone), then down."""


class ExpertsHook:
    """What happens to the operands of a block's experts; the default leaves them alone."""

    sees_every_token = False
    """Whether each expert is shown every token besides those that are routed to it."""

    def routed(self, counts: torch.Tensor, tokens: torch.Tensor) -> None:
        """See the number of rows of each expert [E] and the token of each row [R], int64."""

    def input(self, part: str, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows [*, K] that the product `part` multiplies with."""
        return rows

    def weight(self, part: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight [E, N, K] that the product `part` multiplies with."""
        return weight

    def product(
        self, part: str, rows: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """Return the product `part` [R, N] of rows [R, K], each with its expert's weight."""
        return grouped_linear(rows, weight, counts)


class ExpertsTap(ExpertsHook):
    """Stands before another hook, which does what it did; kinds of it look on.

    Args:
        inner: the other.
    """

    def __init__(self, inner: ExpertsHook) -> None:
        self.inner = inner
        self.tokens: torch.Tensor | None = None
        """Of each row, int64 [R], once they are routed."""

    def routed(self, counts: torch.Tensor, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        self.inner.routed(counts, tokens)

    def input(self, part: str, rows: torch.Tensor) -> torch.Tensor:
        return self.inner.input(part, rows)

    def weight(self, part: str, weight: torch.Tensor) -> torch.Tensor:
        return self.inner.weight(part, weight)

    def product(
        self, part: str, rows: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        return self.inner.product(part, rows, weight, counts)


_PLAIN = ExpertsHook()


def register() -> None:
    """Make `experts_forward` known to transformers; harmless when repeated."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = experts_forward


def experts_forward(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of each token's experts, [T, H].

    The sum over a token's experts runs in the model's dtype in order of their rank, as in
    transformers' grouped implementation, so that results do not depend on the batch.
    """
    hook: ExpertsHook = getattr(module, "autoquant_hook", _PLAIN)
    top_k = top_k_index.shape[-1]
    expert_of_row, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = _counts(expert_of_row, module.num_experts)
    tokens = order // top_k
    hook.routed(counts, tokens)

    inputs = hook.input(WIDE, hidden_states)
    if hook.sees_every_token:
        _show_every_token(module, hook, inputs)
    inner = _inner(module, hook, inputs[tokens], expert_of_row, counts)
    rows = hook.product(DOWN, hook.input(DOWN, inner), _operand(module, hook, DOWN), counts)
    if module.has_bias:
        rows = rows + module.down_proj_bias[expert_of_row]
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1)[order, None].to(rows.dtype)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    by_token = rows.index_select(0, place)
    return by_token.view(-1, top_k, rows.shape[-1]).sum(dim=1)


def _inner(
    module: Any,
    hook: ExpertsHook,
    rows: torch.Tensor,
    expert_of_row: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """What the down projection multiplies [R, I], of rows [R, H] sorted by expert."""
    wide = hook.product(WIDE, rows, _operand(module, hook, WIDE), counts)
    if module.has_bias:
        wide = wide + _wide_bias(module)[expert_of_row]
    inner: torch.Tensor = module._apply_gate(wide) if module.has_gate else module.act_fn(wide)
    return inner


def _show_every_token(module: Any, hook: ExpertsHook, inputs: torch.Tensor) -> None:
    """Let the hook see what each expert's down projection would multiply on all tokens [T, H]."""
    for expert in range(module.num_experts):
        expert_of_row = torch.full((len(inputs),), expert, device=inputs.device)
        counts = _counts(expert_of_row, module.num_experts)
        hook.input(DOWN, _inner(module, hook, inputs, expert_of_row, counts))


def _counts(expert_of_row: torch.Tensor, experts: int) -> torch.Tensor:
    """Rows of each expert [E] int64 of a sorted list, without waiting for the device."""
    each = torch.arange(experts, dtype=expert_of_row.dtype, device=expert_of_row.device)
    ends = torch.searchsorted(expert_of_row, each, right=True)
    return torch.diff(ends, prepend=ends.new_zeros(1))


def parameter_name(module: Any, part: str) -> str:
    """Name of the 3-D parameter behind `part`."""
    if part == DOWN:
        return "down_proj"
    return "gate_up_proj" if module.has_gate else "up_proj"


def check_supported(name: str, module: Any) -> None:
    """Raise unless the experts' operands can be replaced.

    Raises:
        SourceError: a forward that transformers does not dispatch by name, or transposed weights.
    """
    if not hasattr(module, "has_gate"):
        raise SourceError(
            f"{name} ({type(module).__name__}) has a forward of its own, which this version cannot "
            "fake-quantize.",
            fix="fix its experts to bf16 in the search space.",
        )
    if module.is_transposed:
        raise SourceError(
            f"{name} ({type(module).__name__}) keeps its experts transposed, which this version "
            "cannot fake-quantize.",
            fix="fix its experts to bf16 in the search space.",
        )


def _operand(module: Any, hook: ExpertsHook, part: str) -> torch.Tensor:
    weight: torch.Tensor = getattr(module, parameter_name(module, part))
    return hook.weight(part, weight.transpose(1, 2) if module.is_transposed else weight)


def _wide_bias(module: Any) -> torch.Tensor:
    bias: torch.Tensor = getattr(module, f"{parameter_name(module, WIDE)}_bias")
    return bias


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Row r times the transposed weight of its expert: [R, K] x [E, N, K] -> [R, N].

    Rows may have a gradient, weights have none.
    """
    apply: Callable[..., torch.Tensor] = _GroupedLinear.apply
    return apply(rows, weight, counts)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, counts)
        ctx.products = products.current()
        return _multiply(rows, products.multiplied(weight), counts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, counts = ctx.saved_tensors
        with ctx.products.active():
            transposed = products.multiplied(weight).transpose(-2, -1)
            return _multiply(gradient.contiguous(), transposed, counts), None, None


def _multiply(rows: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    if rows.is_cuda and rows.dtype is torch.bfloat16:
        offsets = counts.cumsum(0).to(torch.int32)
        grouped: Callable[..., torch.Tensor] = torch._grouped_mm
        return grouped(rows, weight.transpose(-2, -1), offs=offsets)
    out = rows.new_empty(len(rows), weight.shape[1])
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            _multiply_some(rows, weight[expert].t(), start, count, out)
            start += count
    return out


def _multiply_some(
    rows: torch.Tensor, weight: torch.Tensor, start: int, count: int, out: torch.Tensor
) -> None:
    """Write the products of `count` rows from `start` on to `out`; what follows them may change.

    oneDNN compiles a kernel for every number of rows, which takes ten times as long as a product of
    a thousand rows and a megabyte each. Neighbouring rows are multiplied too, so that few numbers
    occur. A row's product does not depend on them.
    """
    size = min(_rounded_up(count), len(rows))
    first = min(start, len(rows) - size)
    if first == start:
        products.mm(rows[first : first + size], weight, out=out[first : first + size])
    else:
        last = rows.new_empty(size, weight.shape[1])
        products.mm(rows[first:], weight, out=last)
        out[start:] = last[start - first :]


def _rounded_up(count: int) -> int:
    """At least `count`, by an eighth at most, with only four significant bits."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step
