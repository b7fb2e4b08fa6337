"""ModelOpt's NVFP4 kernels where there is no GPU, for which ModelOpt asserts one.

The kernels are Triton's, so Triton's interpreter runs them, with two repairs of the interpreter:
it rounds halves of E4M3 and BF16 up instead of to even, and it cannot call the CUDA library's
`isnan`. The kernel that takes a program for each block is put together from ModelOpt's own
arithmetic of scales and its kernel that rounds 1,024 numbers at once. On a GPU nothing is repaired.
"""

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are first imported

import numpy as np
import pytest
from torch import Tensor

_ROUNDED = {
    "fp8e4nv": (torch.float8_e4m3fn, torch.uint8),
    "bf16": (torch.bfloat16, torch.uint16),
}
"""Types that the interpreter rounds halves up to: PyTorch's, and how the interpreter keeps them."""


@contextlib.contextmanager
def running_kernels() -> Iterator[None]:
    """Let ModelOpt's quantizers compute, on a GPU or on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            pytest.importorskip("triton", reason="triton is not installed")
            _interpret(patch)
        yield


def _interpret(patch: pytest.MonkeyPatch) -> None:
    import modelopt.torch.kernels.quantization.gemm as gemm
    from modelopt.torch.kernels.quantization.common import nvfp4_quant
    from modelopt.torch.kernels.quantization.gemm import fp4_kernel, fp4_kernel_hopper
    from modelopt.torch.quantization import tensor_quant
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def to_nearest_even(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.name == "fp32" and target.name in _ROUNDED:
            dtype, stored = _ROUNDED[target.name]
            return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).view(stored).numpy()
        return convert(values, source, target, rounding)

    patch.setattr(interpreter, "_convert_float", to_nearest_even)
    patch.setattr(nvfp4_quant, "libdevice", SimpleNamespace(isnan=lambda x: x != x))
    patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    patch.setattr(gemm, "IS_AVAILABLE", True)
    kernel = fp4_kernel_hopper.fp4_fake_quant_block
    patch.setattr(gemm, "fp4_fake_quant_block", kernel, raising=False)

    def in_few_programs(
        x: Tensor,
        amax: Tensor,
        global_amax: Tensor | None = None,
        quantize_block_scales: bool = True,
        fp8_max_for_normalization: float = 448.0,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """`static_blockwise_fp4_fake_quant`, whose kernel is one program for each block."""
        scale = fp4_kernel.compute_fp4_scales(
            amax, global_amax, quantize_block_scales, fp8_max_for_normalization
        ).view(-1, 1)
        safe = torch.where(scale == 0, 1.0, scale)
        blocks = x.float().view(len(scale), -1)
        y = fp4_kernel.static_blockwise_fp4_cast(blocks / safe) * safe
        return torch.where(scale == 0, 0.0, y).view(x.shape).to(out_dtype or x.dtype)

    def dynamic(x: Tensor, block_size: int, amax: Tensor, *bits: int) -> Tensor:
        """What `_dynamic_block_quantize_impl` comes to after it has asked for CUDA."""
        return kernel(x, amax)

    patch.setattr(gemm, "static_blockwise_fp4_fake_quant", in_few_programs, raising=False)
    patch.setattr(tensor_quant, "dynamic_block_quantize_op", dynamic)
