"""Checks made before any memory is written; each says the value, the rule and the way out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 16
"""Consecutive elements of the last dimension that share one NVFP4 block scale."""

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN_RULES = ("max", "mse", "four_over_six")
WEIGHTED_RULES = ("diagonal", "hessian")
"""Scale rules that weigh errors by second moments of the inputs."""
RULES = PLAIN_RULES + WEIGHTED_RULES


def require_float(name: str, x: Tensor) -> None:
    """Raise unless `x` is a bfloat16, float16 or float32 tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor.")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name} has dtype {x.dtype}; it must be bfloat16, float16 or float32: cast it first."
        )


def require_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise unless `x` is a tensor of `dtype`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor.")
    if x.dtype != dtype:
        raise ValueError(f"{name} has dtype {x.dtype}; it must be {dtype}.")


def require_output_dtype(dtype: torch.dtype) -> None:
    """Raise unless `dtype` is one that the operations can return."""
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype={dtype}; it must be bfloat16, float16 or float32.")


def require_blocks(name: str, x: Tensor) -> None:
    """Raise unless the last dimension of `x` holds whole blocks of 16."""
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; its last dimension must be a multiple of {BLOCK}: "
            "pad it, or keep this tensor in FP8 or BF16."
        )


def require_rule(rule: str) -> None:
    """Raise unless `rule` names a scale rule."""
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}; it must be one of {', '.join(RULES)}.")


def moment_values(
    rule: str, moments: Tensor | None, shape: Sequence[int], scales: int, device: torch.device
) -> Tensor | None:
    """The second moments of a rule as `[P, K / 16, ...]`, P = 1 or one for each scale.

    Raises:
        ValueError: moments beside a rule without them or missing, or of a wrong shape, dtype or
            device, or not finite.
    """
    if (moments is not None) is not (rule in WEIGHTED_RULES):
        raise ValueError(
            f"rule {rule!r} {'needs' if moments is None else 'takes no'} moments of the inputs; "
            f"{' and '.join(WEIGHTED_RULES)} take them."
        )
    if moments is None:
        return None
    blocks = shape[-1] // BLOCK
    own = (blocks, BLOCK, BLOCK) if rule == "hessian" else (blocks, BLOCK)
    if tuple(moments.shape) not in {own, (scales, *own)}:
        raise ValueError(
            f"moments have shape {tuple(moments.shape)}; rule {rule!r} takes {own} for a weight of "
            f"{shape[-1]} columns, or one such for each scale."
        )
    require_dtype("moments", moments, torch.float32)
    if moments.device != device:
        raise ValueError(f"moments are on {moments.device}; move them to {device}.")
    if not bool(moments.isfinite().all()):
        raise ValueError("moments hold NaN or Inf; find the input that does first.")
    return moments.detach().reshape(-1, *own).contiguous()


def scale_values(name: str, scale: float | Tensor, shape: Sequence[int]) -> list[float]:
    """The positive finite float32 values of a scale of a tensor of `shape`.

    There is one, or one for each of the matrices along the first dimension. A scale that lives on a
    GPU is read back, which waits for that GPU: keep scales on the host.
    """
    if isinstance(scale, Tensor):
        has_one_each = len(shape) > 1 and tuple(scale.shape) == tuple(shape[:1])
        if scale.dtype != torch.float32 or not (scale.numel() == 1 or has_one_each):
            raise ValueError(
                f"{name} has shape {tuple(scale.shape)} and dtype {scale.dtype}; it must be one "
                f"float32 value, or one for each matrix along the first dimension of "
                f"{tuple(shape)}."
            )
        values: list[float] = scale.reshape(-1).tolist()
    else:
        values = [torch.tensor(scale, dtype=torch.float32).item()]
    for value in values:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"{name} is {value}; it must be positive and finite: compute it from the largest "
                "magnitude of the tensor with nvfp4_global_scale or fp8_scale."
            )
    return values


def output(
    out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, *inputs: Tensor
) -> Tensor:
    """`out` after checking it against what the operation writes, or a new tensor.

    Raises:
        ValueError: inputs on different devices; `out` with another shape, dtype or device, not
            contiguous, or overlapping an input.
    """
    device = inputs[0].device
    for x in inputs[1:]:
        if x.device != device:
            raise ValueError(f"inputs on {device} and {x.device}; move them to one device.")
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}; "
            f"it must be {shape} {dtype} on {device}."
        )
    if not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}; it must be contiguous.")
    if any(_overlap(out, x) for x in inputs):
        raise ValueError("out overlaps an input; give it memory of its own.")
    return out


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0:
        return False
    (a_start, a_end), (b_start, b_end) = _extent(a), _extent(b)
    return a_start < b_end and b_start < a_end


def _extent(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
