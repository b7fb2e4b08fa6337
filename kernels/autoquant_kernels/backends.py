"""Which implementation serves a device; `AUTOQUANT_KERNELS` forces one."""

import os
from collections.abc import Sequence
from ctypes import CDLL
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor

from autoquant_kernels import cpu, reference

VARIABLE = "AUTOQUANT_KERNELS"


class Backend(Protocol):
    """The operations on contiguous tensors of one device, with scales already checked.

    `scales` holds one scale, or one for each of as many equal parts of the tensor.
    """

    def fake_quant_nvfp4(self, x: Tensor, scales: Sequence[float], out: Tensor) -> None:
        """Dynamic NVFP4, `[..., K]` to `[..., K]`."""

    def fake_quant_nvfp4_weight(
        self, x: Tensor, scales: Sequence[float], rule: str, moments: Tensor | None, out: Tensor
    ) -> None:
        """Exported-form NVFP4, `[..., K]` to `[..., K]`; moments `[P, K / 16, ...]`."""

    def quantize_nvfp4(
        self,
        x: Tensor,
        scales: Sequence[float],
        rule: str,
        moments: Tensor | None,
        codes: Tensor,
        block_scale: Tensor,
    ) -> None:
        """NVFP4 codes and block scales of `[..., K]`; moments `[P, K / 16, ...]`."""

    def compensate_nvfp4(
        self,
        w: Tensor,
        upper: Tensor,
        scales: Sequence[float],
        rule: str,
        codes: Tensor,
        block_scale: Tensor,
        errors: Tensor,
    ) -> None:
        """NVFP4 codes, block scales and errors of float32 `[P * N, C]`; upper `[P, C, C]`."""

    def dequantize_nvfp4(
        self, codes: Tensor, block_scale: Tensor, scales: Sequence[float], out: Tensor
    ) -> None:
        """NVFP4 codes and block scales to `[..., K]`."""

    def fake_quant_fp8(self, x: Tensor, scales: Sequence[float], out: Tensor) -> None:
        """FP8 there and back, any shape."""

    def quantize_fp8(self, x: Tensor, scales: Sequence[float], codes: Tensor) -> None:
        """FP8 codes of any shape."""

    def compensate_fp8(
        self, w: Tensor, upper: Tensor, scales: Sequence[float], codes: Tensor, errors: Tensor
    ) -> None:
        """FP8 codes and errors of float32 `[P * N, C]`; upper `[P, C, C]`."""

    def dequantize_fp8(self, codes: Tensor, scales: Sequence[float], out: Tensor) -> None:
        """FP8 codes to numbers."""

    def token_kl(self, reference: Tensor, logits: Tensor, out: Tensor) -> None:
        """KL in nats of two `[T, V]` tiles to float32 `[T]`."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A named implementation."""

    name: str
    backend: Backend


REFERENCE = Choice("reference", cast("Backend", reference))


def backend_for(device: torch.device) -> Backend:
    """The implementation that serves `device` under the current `AUTOQUANT_KERNELS`.

    Raises:
        ValueError: the variable names no backend, or one that cannot serve `device` here.
    """
    return _choose(os.environ.get(VARIABLE) or "auto", device.type).backend


def active_backend(device: torch.device | str = "cpu") -> str:
    """The name of the implementation that serves `device`: a value of `AUTOQUANT_KERNELS`.

    Raises:
        ValueError: the variable names no backend, or one that cannot serve `device` here.
    """
    return _choose(os.environ.get(VARIABLE) or "auto", torch.device(device).type).name


@lru_cache
def _choose(wanted: str, device: str) -> Choice:
    if wanted == "auto":
        return _automatic(device)
    if wanted == "reference":
        return REFERENCE
    if wanted == "triton":
        return _triton(device)
    if wanted in cpu.LEVELS:
        return _cpu_level(wanted, device)
    names = ", ".join(("auto", "reference", *cpu.LEVELS, "triton"))
    raise ValueError(f"{VARIABLE}={wanted} names no backend; set it to one of {names}.")


def _automatic(device: str) -> Choice:
    if device == "cpu":
        compiled = cpu.library()
        return REFERENCE if compiled is None else _cpu(compiled, cpu.best_level(compiled))
    if device == "cuda" and find_spec("triton") is not None:
        return _triton(device)
    if device == "cuda":
        cpu.log.warning("triton is not installed; plain PyTorch is used on the GPU, slower.")
    return REFERENCE


def _cpu(compiled: CDLL, level: int) -> Choice:
    return Choice(cpu.LEVELS[level], cpu.CpuBackend(compiled, level))


def _cpu_level(wanted: str, device: str) -> Choice:
    if device != "cpu":
        raise ValueError(f"{VARIABLE}={wanted} cannot serve a tensor on {device}; unset it.")
    compiled = cpu.library()
    if compiled is None:
        raise ValueError(f"{VARIABLE}={wanted}, but the C++ kernels could not be built; unset it.")
    level = cpu.LEVELS.index(wanted)
    best = cpu.best_level(compiled)
    if level > best:
        raise ValueError(
            f"{VARIABLE}={wanted}, but this processor reaches {cpu.LEVELS[best]}; unset it."
        )
    return _cpu(compiled, level)


def _triton(device: str) -> Choice:
    if find_spec("triton") is None:
        raise ValueError(f"{VARIABLE}=triton, but triton is not installed: pip install triton.")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device != "cuda" and not interpreted:
        raise ValueError(
            f"{VARIABLE}=triton cannot serve a tensor on {device}; unset it, or set "
            "TRITON_INTERPRET=1 before the first use to interpret the kernels."
        )
    from autoquant_kernels.gpu import backend

    return Choice("triton", cast("Backend", backend))
