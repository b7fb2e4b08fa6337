"""BF16 products on a processor without BF16 instructions: float32 products, rounded once.

Such a processor widens BF16 operands at every use, or multiplies number by number, several times
slower than it multiplies float32. A float32 copy of an operand holds the same numbers, and the
float32 product rounded to BF16 is what a BF16 product with float32 accumulation gives, up to the
order of the sums.

Inside `CpuProducts.active()` this holds for every product and every attention that Python code
calls: the blocks of a model, its routers, code that comes with it. Tensors in float32 or on a GPU
are left alone. Products have float32 gradients by themselves; PyTorch takes its modes off during a
backward pass, so what multiplies anew in one, enters again.
"""

import os
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from autoquant.environment import CpuPolicy, cpu_policy

COPIES_BYTES = 1 << 30
"""Most memory for float32 copies of weights. A copy saves a tenth of a product with few columns; in
a model whose copies need more than this, products are large beside the conversion."""

_NAMES = ("matmul", "mm", "bmm", "mv", "inner", "addmm", "addbmm", "addmv", "baddbmm")
_ATTENTION = functional.scaled_dot_product_attention
_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        functional.linear,
        _ATTENTION,
        torch.einsum,
        torch.tensordot,
        torch.linalg.matmul,
        torch.Tensor.__rmatmul__,
        *(getattr(where, name) for where in (torch, torch.Tensor) for name in _NAMES),
    }
)
"""What is replaced; `x @ y` arrives as `Tensor.matmul`."""


class CpuProducts:
    """How BF16 tensors on the CPU are multiplied, with float32 copies of weights.

    Args:
        policy: of this processor.
        copies_bytes: memory for the copies.
    """

    def __init__(self, policy: CpuPolicy, copies_bytes: int = COPIES_BYTES) -> None:
        self.policy = policy
        self.copies = Float32Copies(copies_bytes)

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """What suits this processor and a loaded model.

        Raises:
            ConfigError: `AUTOQUANT_CPU_PRODUCTS` names no policy.
        """
        on_cpu = any(parameter.device.type == "cpu" for parameter in model.parameters())
        return cls(cpu_policy(os.environ)[0] if on_cpu else CpuPolicy.BF16)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Multiply by the policy inside, in this thread."""
        before = _current.set(self)
        try:
            with nullcontext() if self.policy is CpuPolicy.BF16 else _Float32Products(self.copies):
                yield
        finally:
            _current.reset(before)


_Copy = tuple[tuple[int, int], torch.Tensor]
"""A weight's count of changes and address when it was copied, and the copy."""


class Float32Copies:
    """Float32 copies of BF16 weights, each made once, as long as the weight lives.

    Copies are made while they fit; a weight that comes later is copied at each of its products.

    Args:
        limit_bytes: memory for all of them.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._copies: MutableMapping[torch.Tensor, _Copy] = WeakTensorKeyDictionary()

    @property
    def bytes(self) -> int:
        """Memory of the copies that are alive."""
        return sum(copy.nbytes for _, copy in self._copies.values())

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` in float32, a kept copy where there can be one."""
        copy = self.find(weight)
        return weight.float() if copy is None else copy

    def find(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The kept copy of `weight`, made if need be, or None where none can be kept.

        A tensor made in inference mode does not count its changes, so that a copy could be stale;
        the copy of one that requires a gradient would have none.
        """
        if not _is_cpu_bf16(weight) or weight.is_inference() or weight.requires_grad:
            return None
        state = weight._version, weight.data_ptr()
        kept = self._copies.get(weight)
        if kept is not None and kept[0] == state:
            return kept[1]
        self._copies.pop(weight, None)
        if self.bytes + 4 * weight.numel() > self.limit_bytes:
            return None
        with torch.inference_mode(False), torch.no_grad():
            copy = weight.float()
        self._copies[weight] = state, copy
        return copy


_current: ContextVar[CpuProducts] = ContextVar("_current")
_AS_THEY_ARE = CpuProducts(CpuPolicy.BF16, 0)


def current() -> CpuProducts:
    """What is active in this thread."""
    return _current.get(_AS_THEY_ARE)


def multiplied(weight: torch.Tensor) -> torch.Tensor:
    """What `mm` multiplies in a weight's place: its float32 copy if one is kept, or the weight."""
    products = current()
    copy = products.copies.find(weight) if products.policy is CpuPolicy.FLOAT32 else None
    return weight if copy is None else copy


def mm(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write rows [R, K] times weight [K, N] to `out` [R, N]; `weight` is part of a `multiplied`."""
    if weight.dtype is rows.dtype:
        torch.mm(rows, weight, out=out)
    else:
        out.copy_(torch.mm(rows.to(weight.dtype), weight))


class _Float32Products(TorchFunctionMode):
    """Replaces products of BF16 tensors on the CPU among the calls of PyTorch functions."""

    def __init__(self, copies: Float32Copies) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not _applies(func, (*args, *kwargs.values())):
            return func(*args, **kwargs)
        if func is functional.linear:
            args, kwargs = self._with_kept_weight(*args, **kwargs), {}
        out = kwargs.get("out")
        named = {name: _widened(value) for name, value in kwargs.items() if name != "out"}
        product: torch.Tensor = func(*map(_widened, args), **named)
        return product.bfloat16() if out is None else out.copy_(product)

    def _with_kept_weight(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        copy = self._copies.find(weight)
        return input, weight if copy is None else copy, bias


def _applies(func: Callable[..., Any], arguments: Iterable[Any]) -> bool:
    """Whether all operands are BF16 on the CPU; an attention's mask may be of another type."""
    masks = (torch.bool, torch.float32) if func is _ATTENTION else ()
    operands = [tensor for tensor in _tensors(arguments) if tensor.dtype not in masks]
    return bool(operands) and all(map(_is_cpu_bf16, operands))


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """All tensors among the arguments of a product, one list of operands deep."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from (value for value in argument if isinstance(value, torch.Tensor))


def _widened(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_widened(each) for each in value]
    is_bf16 = isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16
    return value.float() if is_bf16 else value


def _is_cpu_bf16(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu"
