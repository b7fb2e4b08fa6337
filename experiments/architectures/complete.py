"""Whether an engine's loader fills every parameter of a model.

Loaders of serving engines skip names that they do not know, some without a word. What a parameter
holds then is what was in memory. So parameters are filled with a mark before weights are loaded,
and a row that still holds nothing but the mark was never written.
"""

from collections.abc import Callable

import torch

MARK = 0xA5
"""Of bytes, which hold packed codes; numbers are marked by not a number."""

ENGINES_OWN = frozenset(
    (
        *(f"{name}_{part}" for name in ("q", "k", "v", "prob") for part in ("scale", "zero_point")),
        *("w13_blockscale_swizzled", "w2_blockscale_swizzled"),
    )
)
"""Parameters that no checkpoint holds: of an attention whose cache is not quantized, and what
SGLang makes of block scales once they are loaded."""


def load_all(
    model: torch.nn.Module, load: Callable[[], None], unused: tuple[str, ...] = ()
) -> None:
    """Let an engine load a model's weights.

    Args:
        model: built, without its weights.
        load: writes them.
        unused: ends of names of parameters that the engine makes and never reads.

    Raises:
        RuntimeError: a parameter, or a row of one, was left as it was; says which ones.
    """
    marked = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] not in ENGINES_OWN
        and not name.endswith(unused)
        and mark(parameter.data)
    }
    load()
    left = [
        name
        for name, parameter in model.named_parameters()
        if name in marked and is_marked(parameter.data)
    ]
    if left:
        raise RuntimeError(f"{len(left)} parameters are not loaded: {', '.join(left[:4])}")


def mark(tensor: torch.Tensor) -> bool:
    """Fill a tensor with the mark of its kind; False where that kind has none."""
    if tensor.dtype in (torch.uint8, torch.int8) or tensor.element_size() == 1:
        tensor.view(torch.uint8).fill_(0xFF if tensor.dtype.is_floating_point else MARK)
    elif tensor.dtype.is_floating_point:
        tensor.fill_(torch.nan)
    else:
        return False
    return True


def is_marked(tensor: torch.Tensor) -> bool:
    """Whether a row, or a number alone, still is the mark."""
    if tensor.dtype.is_floating_point:
        marked = tensor.isnan() if tensor.element_size() > 1 else tensor.float().isnan()
    else:
        marked = tensor.view(torch.uint8) == MARK
    return bool((marked.all(-1) if marked.ndim > 1 else marked).any())
