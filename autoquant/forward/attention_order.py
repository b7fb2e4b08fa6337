"""Gradients of attention that are equal each time on a GPU.

PyTorch's fused kernels add what the blocks of keys contribute to a query's gradient in the order in
which these are ready, so that its last digits differ from run to run. Each can add in one order,
where `torch.use_deterministic_algorithms` asks for it. Asked for in a whole backward pass, that
ends at the first product, unless an environment variable gives cuBLAS a workspace of fixed size. So
attention alone asks, in a backward pass of its own that begins with its forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_ATTENTION = functional.scaled_dot_product_attention
_IN_ONE_ORDER = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of PyTorch's kernels; the last one does by itself. cuDNN's does not."""

_Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def attention_in_one_order(device: torch.device) -> Iterator[None]:
    """Let backward passes of the attention inside add in one order, on a GPU."""
    if device.type != "cuda":  # a CPU's kernels do by themselves
        yield
        return
    with sdpa_kernel(_IN_ONE_ORDER), _AttentionMode():
        yield


class _AttentionMode(TorchFunctionMode):
    """Replaces attention among the calls of PyTorch functions."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _ATTENTION or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        return _attention(*args, **kwargs)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *given: Any, **named: Any
) -> torch.Tensor:
    """PyTorch's attention, with a gradient that is equal each time where a fused kernel takes it.

    Args:
        query, key, value: [b, heads, L, D].
        given, named: what else it takes.
    """
    if not _is_fused(query, key, value, *given, **named):
        plain: torch.Tensor = _ATTENTION(query, key, value, *given, **named)
        return plain

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _ATTENTION(query, key, value, *given, **named)
        return output

    apply: Callable[..., torch.Tensor] = _InOneOrder.apply
    return apply(query, key, value, attend)


def _is_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether flash attention or the memory-efficient one takes these operands."""
    if attn_mask is not None and attn_mask.requires_grad:
        return False
    cuda = torch.backends.cuda
    params = cuda.SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    return cuda.can_use_flash_attention(params) or cuda.can_use_efficient_attention(params)


class _InOneOrder(torch.autograd.Function):
    """Attention that its backward pass computes again, to go back through it alone."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attend: _Attend
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.attend = attend
        return attend(query, key, value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        operands = [own.detach().requires_grad_() for own in ctx.saved_tensors]
        with torch.enable_grad():
            output = ctx.attend(*operands)
        with _deterministic():
            return *torch.autograd.grad(output, operands, gradient), None


@contextmanager
def _deterministic() -> Iterator[None]:
    """Ask PyTorch's kernels for one order of their sums inside."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
