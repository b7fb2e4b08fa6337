"""Fused NVFP4 and FP8 fake-quantization and packing, bit-exact on every backend, and token KL.

    from autoquant_kernels import fake_quant_nvfp4_weight, nvfp4_global_scale

    amax = weight.abs().max()
    scored = fake_quant_nvfp4_weight(weight, nvfp4_global_scale(amax))

The arithmetic is IEEE float32 with every operation rounded once, so the plain PyTorch reference,
the C++ file and the Triton kernels return the same bits; sums of a KL differ in their order.
`AUTOQUANT_KERNELS` forces a backend.
"""

from autoquant_kernels.backends import active_backend
from autoquant_kernels.compensated import compensate_fp8, compensate_nvfp4
from autoquant_kernels.fp8 import dequantize_fp8, fake_quant_fp8, quantize_fp8
from autoquant_kernels.kl import head_token_kl, token_kl
from autoquant_kernels.nvfp4 import (
    dequantize_nvfp4,
    fake_quant_nvfp4,
    fake_quant_nvfp4_weight,
    quantize_nvfp4,
)
from autoquant_kernels.scales import fp8_scale, nvfp4_global_scale

__all__ = [
    "active_backend",
    "compensate_fp8",
    "compensate_nvfp4",
    "dequantize_fp8",
    "dequantize_nvfp4",
    "fake_quant_fp8",
    "fake_quant_nvfp4",
    "fake_quant_nvfp4_weight",
    "fp8_scale",
    "head_token_kl",
    "nvfp4_global_scale",
    "quantize_fp8",
    "quantize_nvfp4",
    "token_kl",
]
