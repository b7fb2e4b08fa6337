"""What a static input scale is to hold, from what calibration saw."""

from dataclasses import dataclass

NORMAL_RANGE = 28_672.0
"""Largest over smallest normal number of E4M3, 448 / 2^-6: a block whose largest magnitude is below
the range of the inputs over this has a subnormal scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRange:
    """What calibration saw of an input set."""

    amax: float
    """Largest magnitude."""
    small: float | None = None
    """What the largest magnitude of 99 blocks of 100 is not below; None without such blocks."""

    def with_headroom(self, factor: float) -> float:
        """The magnitude that a static scale is to hold, no less than the largest seen.

        Other text reaches further than the calibration text did. Headroom costs nothing as long as
        the scales of small blocks stay normal numbers, which bounds it.
        """
        return max(self.amax, min(factor * self.amax, self.bound))

    @property
    def bound(self) -> float:
        """The widest range under which the scales of 99 blocks of 100 are normal numbers."""
        return NORMAL_RANGE * self.small if self.small is not None else float("inf")
