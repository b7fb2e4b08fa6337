"""Codes that are fitted to inputs, and used only where they serve inputs that they never saw.

Some sequences are held out of the fit. On them the damping of compensated rounding is chosen, and a
linear to which codes of the weight alone do less harm keeps those. Then all tokens are fitted.

Shapes: M matrices with scales of their own, each of L linears one below the other, N outputs,
K inputs, B blocks of 16 of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.formats.base import NEAREST, Coder
from autoquant.formats.choice import Choice
from autoquant.formats.compensated import Factor, compensated
from autoquant.formats.moments import ALL, FITTED, HELD_OUT, Moments, known_or_identity
from autoquant.formats.packed import Packed, Statistics
from autoquant.formats.refitted import Refit
from autoquant.formats.rounded import Rounded, harm

DAMPINGS = (0.01, 0.05, 0.1)
"""Tried for the diagonal of H, in shares of its mean."""

CHUNK_BYTES = 2**29
"""Matrices are rounded together as long as their factors and copies take no more."""

KEPT_BYTES = 2**26
"""A factor that takes no more is kept for the other choices of the same linears."""

_DOES_HARM = "its codes did more harm than those of the weight alone on held-out inputs"
_NO_FACTOR = "the second moments of its inputs have no Cholesky factor"

_Judge = Callable[[Rounded], Tensor]
"""Of codes: the harm that each linear does to some tokens, float64 [M, L]."""


def encode(weight: Tensor, choice: Choice, statistics: Statistics, scale: Tensor) -> Packed:
    """The codes of a weight under a choice that needs moments of its inputs.

    Args:
        weight: BF16 [N, K], or [E, N, K].
        choice: of a format with a `coder`.
        statistics: with the moments.
        scale: float32 on the host, 0-dimensional or [E].
    """
    assert statistics.moments is not None
    rounded, plain = fit(
        weight if weight.ndim == 3 else weight[None],
        choice.format.coder(choice, scale.view(-1)),
        choice.rounding,
        statistics.moments,
        statistics.rows,
        statistics.drift,
    )
    parts = {name: part.reshape(*weight.shape[:-1], -1) for name, part in rounded.parts.items()}
    experts = len(weight) if weight.ndim == 3 else None
    return Packed(choice, parts | {choice.format.tensor_scale: scale}, experts, plain)


def fit(
    weight: Tensor,
    coder: Coder,
    rounding: str,
    moments: Moments,
    rows: Sequence[int],
    drift: Moments | None = None,
) -> tuple[Rounded, dict[tuple[int, int], str]]:
    """Fit the codes of M matrices; linears that do not gain have those of the weight alone.

    Args:
        weight: BF16 [M, N, K].
        coder: of the matrices.
        rounding: `nearest`, under scales that weigh by inputs, `gptq`, or `refit`.
        moments: of the inputs, on the device of `weight`.
        rows: of each of the L linears that every matrix joins; N in all.
        drift: of these inputs from the BF16 model's, for `refit`; see `Statistics`.

    Returns:
        The codes, and why a linear has others by its matrix and its place there.
    """
    parts: list[Rounded] = []
    plain: dict[tuple[int, int], str] = {}
    for own in _chunks(weight):
        moved = None if drift is None else drift.of(own)
        task = _Task(weight[own], coder.of(own), rounding, moments.of(own), rows, moved)
        rounded, reasons = task.fit()
        parts.append(rounded)
        for matrix, of_linears in enumerate(reasons, start=own.start):
            plain |= {(matrix, i): why for i, why in enumerate(of_linears) if why is not None}
    return Rounded.joined(parts), plain


def _chunks(weight: Tensor) -> Iterator[slice]:
    matrices, outputs, inputs = weight.shape
    each = 4 * inputs * (8 * inputs + 4 * len(DAMPINGS) * outputs)
    size = max(1, CHUNK_BYTES // each)
    for start in range(0, matrices, size):
        yield slice(start, min(start + size, matrices))


@dataclass(frozen=True, slots=True)
class _Task:
    """The arguments of `fit` for matrices that are rounded together."""

    weight: Tensor
    coder: Coder
    rounding: str
    moments: Moments
    rows: Sequence[int]
    drift: Moments | None

    def fit(self) -> tuple[Rounded, list[list[str | None]]]:
        """The codes, and why each linear [M][L] has plain ones; None where it has not."""
        plain = Rounded(self.coder.plain(self.weight))
        why = self.moments.why_plain()
        if None not in why:
            return plain, [[reason] * len(self.rows) for reason in why]
        usable = torch.tensor([reason is None for reason in why], device=self.weight.device)
        refit = None
        if self.drift is not None:
            refit = Refit.best(self.weight, self.moments, self.drift)
        every, held_out = (self._judge(tokens, refit) for tokens in (ALL, HELD_OUT))
        if self.rounding == NEAREST:
            found, after = self._weighted(ALL), held_out(self._weighted(FITTED))
            has_factor = torch.ones_like(usable)
        else:
            dampings, after = self._best_damping(held_out, self._aim(FITTED, refit))
            factor = self._factor(dampings, ALL)
            found = compensated(self._aim(ALL, refit), self.coder, factor)
            has_factor = factor.has_factor
        gains = after <= held_out(plain)
        gains &= every(found) <= every(plain)
        gains &= (usable & has_factor)[:, None]
        of_rows = torch.cat(
            [own[:, None].expand(-1, n) for own, n in zip(gains.unbind(1), self.rows, strict=True)],
            dim=1,
        )
        reasons = [
            [None if gain else reason or (_DOES_HARM if factor else _NO_FACTOR) for gain in own]
            for own, reason, factor in zip(gains.tolist(), why, has_factor.tolist(), strict=True)
        ]
        return found.where(of_rows, plain), reasons

    def _best_damping(self, held_out: _Judge, aim: Tensor) -> tuple[list[float], Tensor]:
        """The damping of least harm to held-out inputs of each matrix, and that harm [M, L].

        All are tried in one sweep: a GPU waits for each of its steps.
        """
        matrices, tries = len(self.weight), len(DAMPINGS)
        factors = [self._factor([one] * matrices, FITTED) for one in DAMPINGS]
        codes = compensated(
            aim.repeat(tries, 1, 1), self.coder.repeated(tries), Factor.joined(factors)
        )
        harms = torch.stack([held_out(own) for own in codes.parted(tries)])
        best = harms.sum(dim=2).nan_to_num(torch.inf).argmin(dim=0)
        least = harms[best, torch.arange(matrices, device=best.device)]
        return [DAMPINGS[number] for number in best.tolist()], least

    def _factor(self, dampings: Sequence[float], tokens: slice) -> Factor:
        """Of the moments of these tokens, kept for other choices where it is small."""
        key = (tokens.start, tokens.stop, *dampings)
        kept: Factor | None = self.moments.kept.get(key)
        if kept is not None:
            return kept
        damping = torch.tensor(dampings, device=self.weight.device)
        factor = Factor.of(known_or_identity(self.moments.mean(tokens)), damping)
        if factor.upper.numel() * factor.upper.element_size() <= KEPT_BYTES:
            self.moments.kept[key] = factor
        return factor

    def _weighted(self, tokens: slice) -> Rounded:
        """Nearest codes under scales weighted by inputs of these tokens."""
        return Rounded(self.coder.weighted(self.weight, self.moments, tokens))

    def _aim(self, tokens: slice, refit: Refit | None) -> Tensor:
        """What codes fitted to these tokens are to be near."""
        return self.weight if refit is None else refit.refitted(tokens)

    def _judge(self, tokens: slice, refit: Refit | None) -> _Judge:
        """The harm [M, L] that codes do to inputs of these tokens."""
        moments = known_or_identity(self.moments.mean(tokens))
        pull = None if refit is None else refit.pull(tokens)
        return lambda codes: harm(
            self.weight, self.coder.decode(codes.parts), moments, self.rows, pull
        )
