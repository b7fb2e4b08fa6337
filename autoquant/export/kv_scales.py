"""Scales of an FP8 cache of keys and values, as each layout stores them."""

from collections.abc import Mapping

import autoquant_kernels as kernels
from torch import Tensor

from autoquant.export.layouts.base import Layout, StoredTensor
from autoquant.plan.kv_cache import KvRange

_NAMES: Mapping[Layout, tuple[str, str]] = {
    Layout.MODELOPT: (".k_proj.k_scale", ".v_proj.v_scale"),
    Layout.COMPRESSED_TENSORS: (".k_scale", ".v_scale"),
}
_SHAPES: Mapping[Layout, tuple[int, ...]] = {
    Layout.MODELOPT: (),
    Layout.COMPRESSED_TENSORS: (1,),
}


def kv_scale_tensors(attention: str, layout: Layout) -> tuple[StoredTensor, StoredTensor]:
    """What an attention module stores for its keys, and for its values."""
    keys, values = _NAMES[layout]
    return (
        StoredTensor(name=attention + keys, dtype="F32", shape=_SHAPES[layout]),
        StoredTensor(name=attention + values, dtype="F32", shape=_SHAPES[layout]),
    )


def attention_of(name: str, layout: Layout) -> str | None:
    """The attention module that a scale of the cache belongs to; None for any other tensor."""
    end = next((end for end in _NAMES[layout] if name.endswith(end)), None)
    return name.removesuffix(end) if end else None


def kv_scales(ranges: Mapping[str, KvRange], layout: Layout) -> dict[str, dict[str, Tensor]]:
    """The scales by name, under the source's tensor that they are stored beside: amax / 448."""
    beside: dict[str, dict[str, Tensor]] = {}
    for attention, found in ranges.items():
        stored = zip(kv_scale_tensors(attention, layout), (found.keys, found.values), strict=True)
        beside[f"{attention}.k_proj.weight"] = {
            tensor.name: kernels.fp8_scale(amax).reshape(tensor.shape) for tensor, amax in stored
        }
    return beside
