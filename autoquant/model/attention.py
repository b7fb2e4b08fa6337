"""Keys and values of a live model as an FP8 cache returns them.

Engines round keys after their rotation, and values as they are, when they put them into the cache,
and attention reads what the cache holds. transformers dispatches attention by name, with keys and
values in that state, so an implementation of our own can do the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import autoquant_kernels as kernels
import torch

from autoquant.errors import SourceError
from autoquant.model.binding import Names
from autoquant.plan.kv_cache import KvRange

IMPLEMENTATION = "autoquant_sdpa"
"""Value of `config._attn_implementation` that selects `attention_forward`."""

_INNER = "sdpa"


@dataclass(slots=True)
class _CachedTensor:
    """The keys, or the values, of one attention module."""

    largest: float | None = None
    scale: float | None = None

    def observe(self, states: torch.Tensor, whose: str) -> None:
        lowest, highest = torch.aminmax(states)
        largest = torch.maximum(-lowest, highest).item()
        if not largest < float("inf"):
            raise SourceError(
                f"keys or values of {whose} hold NaN or Inf in BF16 on the calibration text.",
                fix="check the weights of the layers before it; no scale can hold such a range.",
            )
        self.largest = max(largest, self.largest or 0.0)

    def cached(self, states: torch.Tensor) -> torch.Tensor:
        assert self.scale is not None, "the cache was not calibrated"
        return kernels.fake_quant_fp8(states, self.scale)


@dataclass(slots=True)
class _Switch:
    """What happens to keys and values at this moment, in all modules alike."""

    observing: bool = False
    rounding: bool = False


class _Hook:
    """Stands between an attention module and its keys and values."""

    def __init__(self, name: str, switch: _Switch) -> None:
        self.name, self.switch = name, switch
        self.keys, self.values = _CachedTensor(), _CachedTensor()

    def __call__(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.switch.observing:
            self.keys.observe(keys, self.name)
            self.values.observe(values, self.name)
        if self.switch.rounding:
            return self.keys.cached(keys), self.values.cached(values)
        return keys, values


class QuantizedCache:
    """The cache of keys and values of a live model, to be rounded to FP8 on demand.

    Args:
        model: a transformers causal language model whose attention runs in PyTorch's SDPA.
        names: where it keeps the tensors of its checkpoint.
        attention: names on disk of the attention modules.

    Raises:
        SourceError: the model computes its attention in another way.
    """

    def __init__(self, model: Any, names: Names, attention: Iterable[str]) -> None:
        self._switch = _Switch()
        self._hooks: dict[str, _Hook] = {}
        for name in attention:
            parameter, _ = names.locate(f"{name}.k_proj.weight")
            module = model.get_submodule(parameter.rsplit(".", 2)[0])
            self._hooks[name] = module.autoquant_cache = _Hook(name, self._switch)
        _select(model)

    def observe(self, on: bool) -> None:
        """Widen the ranges by whatever passes from now on, or no longer."""
        self._switch.observing = on

    def round(self, on: bool) -> None:
        """Round to FP8 whatever passes from now on, or no longer."""
        self._switch.rounding = on

    def observed_ranges(self) -> dict[str, KvRange]:
        """Largest keys and values of each attention module.

        Raises:
            SourceError: a module's keys and values were not seen: its attention goes another way.
        """
        ranges = {}
        for name, hook in self._hooks.items():
            if hook.keys.largest is None or hook.values.largest is None:
                raise SourceError(
                    f"the keys and values of {name} do not pass where a cache would take them.",
                    fix="leave out --kv-cache for this architecture.",
                )
            ranges[name] = KvRange(keys=hook.keys.largest, values=hook.values.largest)
        return ranges

    def set_ranges(self, ranges: Mapping[str, KvRange]) -> None:
        """Fix the scales that export stores for calibrated ranges: amax / 448."""
        self.set_scales(
            {
                name: (kernels.fp8_scale(r.keys).item(), kernels.fp8_scale(r.values).item())
                for name, r in ranges.items()
            }
        )

    def set_scales(self, scales: Mapping[str, tuple[float, float]]) -> None:
        """Fix the scales of keys and of values by attention module."""
        for name, (keys, values) in scales.items():
            self._hooks[name].keys.scale, self._hooks[name].values.scale = keys, values


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *rest: Any,
    **more: Any,
) -> Any:
    """PyTorch's scaled dot-product attention over keys and values as the cache returns them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    hook = getattr(module, "autoquant_cache", None)
    if hook is None:
        raise SourceError(
            f"a {type(module).__name__} of the model caches keys and values that are no k_proj and "
            "v_proj of its own.",
            fix="leave out --kv-cache for this architecture.",
        )
    key, value = hook(key, value)
    return sdpa_attention_forward(module, query, key, value, *rest, **more)


def _select(model: Any) -> None:
    """Let the model's attention go through `attention_forward`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    before = model.config.get_text_config()._attn_implementation
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    if before == _INNER:
        model.set_attn_implementation(IMPLEMENTATION)
    if model.config.get_text_config()._attn_implementation != IMPLEMENTATION:
        raise SourceError(
            f"{type(model).__name__} computes its attention by {before!r}, and an FP8 cache is "
            f"measured with {_INNER!r}.",
            fix="leave out --kv-cache for this architecture.",
        )
