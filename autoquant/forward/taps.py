"""First-order effect of every choice of every group on a scalar, from one backward pass.

A tap stands behind each product y = x W^T of the groups in question. In the backward pass it holds
x, y and the gradient g of the scalar at y; it multiplies again under each choice, with exactly the
operands of a candidate, and adds <g, y' - y> to the effect of the token that the row belongs to.

Shapes: T tokens of a batch in order, R rows of a product, N outputs.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Self

import torch

from autoquant.codes.book import Key
from autoquant.formats import Choice
from autoquant.model.experts import ExpertsHook, ExpertsTap
from autoquant.model.live import QuantizedModel

_CHUNK_ELEMENTS = 1 << 22
"""Elements of a product that are compared at a time, in float32."""

Receive = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Takes x, y and the gradient at y."""


class Taps:
    """Taps on every module of the groups that `keys` names.

    Args:
        quantized: all groups in BF16.
        keys: the (group, choice) pairs whose effects are wanted.
        tokens: T.
    """

    def __init__(self, quantized: QuantizedModel, keys: Iterable[Key], tokens: int) -> None:
        self._quantized = quantized
        self._tokens = tokens
        self._choices: dict[str, list[Choice]] = {}
        for group, choice in keys:
            self._choices.setdefault(group, []).append(choice)
        self.effects: dict[Key, torch.Tensor] = {}
        """Change of the scalar through each token's products, float32 [T]; complete after the
        backward pass. A key whose group no gradient reached is absent."""

    @classmethod
    def watching(cls, quantized: QuantizedModel, tokens: int) -> Self:
        """Taps on every group that keep what they compare, and try nothing."""
        taps = cls(quantized, (), tokens)
        taps._choices = {group.name: [] for group in quantized.groups}
        return taps

    def installed(self) -> AbstractContextManager[None]:
        """Tap the forwards inside; their backward passes belong inside too."""
        return self._quantized.replacing(self._taps())

    def _taps(self) -> Iterator[tuple[Any, str, Any]]:
        for group, module in self._quantized.modules():
            if group in self._choices:
                name = "autoquant_hook" if hasattr(module, "autoquant_hook") else "forward"
                original = getattr(module, name)
                tap = _ExpertsTap if isinstance(original, ExpertsHook) else _DenseTap
                yield module, name, tap(self, group, original)

    def add(
        self,
        group: str,
        multiply: Callable[[], torch.Tensor],
        y: torch.Tensor,
        gradient: torch.Tensor,
        tokens: torch.Tensor | None = None,
    ) -> None:
        """Add a product's part to the effects of its group.

        Args:
            group: whose choices are tried.
            multiply: computes the product under the choice in force.
            y: the product in BF16; rows in the order of the tokens unless `tokens` says otherwise.
            gradient: of the scalar at `y`.
            tokens: token of each row, int64 [R].

        Raises:
            ValueError: rows that are no tokens.
        """
        rows = y.flatten(0, -2)
        if tokens is None and len(rows) % self._tokens:
            raise ValueError(f"{group} multiplies {len(rows)} rows of {self._tokens} tokens")
        for choice in self._choices[group]:
            self._quantized.choose({group: choice})
            try:
                with self._quantized.products.active():
                    changed = multiply().view_as(rows)
            finally:
                self._quantized.choose({})
            effect = _change(gradient.reshape(rows.shape), changed, rows)
            total = self.effects.setdefault((group, choice), effect.new_zeros(self._tokens))
            if tokens is None:
                total += effect.view(self._tokens, -1).sum(dim=1)
            elif total.is_cuda:  # where `index_add_` adds in another order each time
                total.index_put_((tokens,), effect, accumulate=True)
            else:
                total.index_add_(0, tokens, effect)


class _DenseTap:
    """Stands in for the forward of one linear."""

    def __init__(self, taps: Taps, group: str, forward: Any) -> None:
        self._taps, self._group, self._forward = taps, group, forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._forward(x)
        return tapped(x, y, self._receive)

    def _receive(self, x: torch.Tensor, y: torch.Tensor, gradient: torch.Tensor) -> None:
        self._taps.add(self._group, lambda: self._forward(x), y, gradient)


class _ExpertsTap(ExpertsTap):
    """Stands between a block's experts and the hook that quantizes their operands."""

    def __init__(self, taps: Taps, group: str, inner: ExpertsHook) -> None:
        super().__init__(inner)
        self._taps, self._group = taps, group

    def product(
        self, part: str, rows: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        inner, tokens = self.inner, self.tokens

        def receive(x: torch.Tensor, y: torch.Tensor, gradient: torch.Tensor) -> None:
            def multiply() -> torch.Tensor:
                return inner.product(part, inner.input(part, x), inner.weight(part, weight), counts)

            self._taps.add(self._group, multiply, y, gradient, tokens)

        return tapped(rows, inner.product(part, rows, weight, counts), receive)


class _Tap(torch.autograd.Function):
    """Passes a product on; its backward pass also hands x, y and the gradient to a receiver."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, receive: Receive) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        ctx.receive = receive
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        ctx.receive(*ctx.saved_tensors, gradient)
        return None, gradient, None


def tapped(x: torch.Tensor, y: torch.Tensor, receive: Receive) -> torch.Tensor:
    """The product y of an input x, handed to `receive` in the backward pass with its gradient."""
    apply: Callable[..., torch.Tensor] = _Tap.apply
    return apply(x.detach(), y, receive)


def _change(gradient: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """<gradient, new - old> of each row, float32 [R], of three [R, N]."""
    rows = max(1, _CHUNK_ELEMENTS // old.shape[-1])
    parts = zip(gradient.split(rows), new.split(rows), old.split(rows), strict=True)
    return torch.cat([((n.float() - o.float()) * g.float()).sum(dim=-1) for g, n, o in parts])
