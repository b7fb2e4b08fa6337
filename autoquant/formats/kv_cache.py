"""Formats of the cache of keys and values: BF16, or FP8 with a scale per attention module."""

from enum import StrEnum
from typing import Literal, Self

KvCacheName = Literal["bf16", "fp8"]
"""The values of `KvCache`, as settings name them."""


class KvCache(StrEnum):
    """How engines keep the keys and values of earlier tokens."""

    BF16 = "bf16"
    FP8 = "fp8"

    @property
    def is_quantized(self) -> bool:
        """Whether a checkpoint stores scales for it."""
        return self is not KvCache.BF16

    @classmethod
    def of(cls, *, quantized: bool) -> Self:
        """The cache with scales, or the one without."""
        return cls.FP8 if quantized else cls.BF16
