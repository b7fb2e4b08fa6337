"""The cache of keys and values: in BF16, or in FP8 with a scale per attention module and tensor."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from autoquant.errors import ConfigError
from autoquant.formats import SCALAR_BYTES
from autoquant.plan.grouping import Groups

_KEYS, _VALUES = ".k_proj", ".v_proj"


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

    def attention(self, groups: Groups) -> tuple[str, ...]:
        """Names on disk of the attention modules that need scales for the cache.

        Raises:
            ConfigError: see `attention_modules`.
        """
        return attention_modules(groups) if self.is_quantized else ()

    def stored_bytes(self, groups: Groups) -> int:
        """Bytes of the scales that a checkpoint of these groups stores for its cache.

        Raises:
            ConfigError: see `attention_modules`.
        """
        return 2 * SCALAR_BYTES * len(self.attention(groups))


@dataclass(frozen=True, slots=True)
class KvRange:
    """Largest magnitudes of what one attention module caches, keys after their rotation."""

    keys: float
    values: float


def attention_modules(groups: Groups) -> tuple[str, ...]:
    """Names on disk of the attention modules whose keys and values are linears of their own.

    Raises:
        ConfigError: there are none; compressed (MLA) and fused keys and values are not told apart.
    """
    linears = {linear.name for linear in groups.linears}
    parents = [name.removesuffix(_KEYS) for name in linears if name.endswith(_KEYS)]
    found = [name for name in parents if name + _VALUES in linears]
    if not found:
        raise ConfigError(
            "an FP8 cache of keys and values needs attention with k_proj and v_proj, and the model "
            "has none.",
            fix="leave out --kv-cache; such a model keeps its cache in BF16.",
        )
    order = {linear.name: place for place, linear in enumerate(groups.linears)}
    return tuple(sorted(found, key=lambda name: order[name + _KEYS]))
