"""Which attention modules have a cache of keys and values, and what its scales take."""

from dataclasses import dataclass

from autoquant.errors import ConfigError
from autoquant.formats import SCALAR_BYTES
from autoquant.formats.kv_cache import KvCache
from autoquant.plan.grouping import Groups

_KEYS, _VALUES = ".k_proj", ".v_proj"


def cached_attention(kv_cache: KvCache, groups: Groups) -> tuple[str, ...]:
    """Names on disk of the attention modules that need scales for the cache.

    Raises:
        ConfigError: see `attention_modules`.
    """
    return attention_modules(groups) if kv_cache.is_quantized else ()


def cache_bytes(kv_cache: KvCache, groups: Groups) -> int:
    """Bytes of the scales that a checkpoint of these groups stores for its cache.

    Raises:
        ConfigError: see `attention_modules`.
    """
    return 2 * SCALAR_BYTES * len(cached_attention(kv_cache, groups))


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
