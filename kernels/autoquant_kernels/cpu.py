"""The C++ kernels, called through ctypes; one `CpuBackend` per instruction set."""

import ctypes
import logging
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from autoquant_kernels import build
from autoquant_kernels.checks import BLOCK, RULES

LEVELS = ("cpu-scalar", "cpu-avx2", "cpu-avx512", "cpu-avx512bf16")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPERATIONS = (
    "fake_quant_nvfp4",
    "fake_quant_nvfp4_weight",
    "quantize_nvfp4",
    "compensate_nvfp4",
    "dequantize_nvfp4",
    "fake_quant_fp8",
    "quantize_fp8",
    "compensate_fp8",
    "dequantize_fp8",
    "token_kl",
)

log = logging.getLogger("autoquant_kernels")


class Job(ctypes.Structure):
    """The arguments of every kernel, as `fused.cpp` declares them."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        ("source2", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out2", ctypes.c_void_p),
        ("out3", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
        ("parts", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("moments", ctypes.c_void_p),
        ("row_blocks", ctypes.c_int64),
        ("part_moments", ctypes.c_int64),
        ("first_block", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("rule", ctypes.c_int32),
    )


class CpuBackend:
    """The kernels of one instruction set, on as many threads as torch uses."""

    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        self._run_kernel = library.autoquant_run
        self._level = level

    def fake_quant_nvfp4(self, x: Tensor, scales: Sequence[float], out: Tensor) -> None:
        self._run("fake_quant_nvfp4", (x,), (out,), x, scales)

    def fake_quant_nvfp4_weight(
        self, x: Tensor, scales: Sequence[float], rule: str, moments: Tensor | None, out: Tensor
    ) -> None:
        self._run("fake_quant_nvfp4_weight", (x,), (out,), x, scales, rule, moments)

    def quantize_nvfp4(
        self,
        x: Tensor,
        scales: Sequence[float],
        rule: str,
        moments: Tensor | None,
        codes: Tensor,
        block_scale: Tensor,
    ) -> None:
        self._run("quantize_nvfp4", (x,), (codes, block_scale), x, scales, rule, moments)

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
        outs = (codes, block_scale, errors)
        self._run("compensate_nvfp4", (w,), outs, w, scales, rule, upper)

    def dequantize_nvfp4(
        self, codes: Tensor, block_scale: Tensor, scales: Sequence[float], out: Tensor
    ) -> None:
        self._run("dequantize_nvfp4", (codes, block_scale), (out,), out, scales)

    def fake_quant_fp8(self, x: Tensor, scales: Sequence[float], out: Tensor) -> None:
        self._run("fake_quant_fp8", (x,), (out,), x, scales)

    def quantize_fp8(self, x: Tensor, scales: Sequence[float], codes: Tensor) -> None:
        self._run("quantize_fp8", (x,), (codes,), x, scales)

    def compensate_fp8(
        self, w: Tensor, upper: Tensor, scales: Sequence[float], codes: Tensor, errors: Tensor
    ) -> None:
        self._run("compensate_fp8", (w,), (codes, errors), w, scales, moments=upper)

    def dequantize_fp8(self, codes: Tensor, scales: Sequence[float], out: Tensor) -> None:
        self._run("dequantize_fp8", (codes,), (out,), out, scales)

    def token_kl(self, reference: Tensor, logits: Tensor, out: Tensor) -> None:
        self._run("token_kl", (reference, logits), (out,), logits)

    def _run(
        self,
        operation: str,
        sources: tuple[Tensor, ...],
        outs: tuple[Tensor, ...],
        unpacked: Tensor,
        scales: Sequence[float] = (),
        rule: str = "max",
        moments: Tensor | None = None,
    ) -> None:
        parts = len(scales) or unpacked.shape[0]
        values = (ctypes.c_float * len(scales))(*scales)
        has_one_each = moments is not None and len(moments) == parts
        job = Job(
            source=sources[0].data_ptr(),
            source2=sources[-1].data_ptr(),
            out=outs[0].data_ptr(),
            out2=outs[min(1, len(outs) - 1)].data_ptr(),
            out3=outs[-1].data_ptr(),
            elements=unpacked.numel() // parts,
            parts=parts,
            scales=ctypes.addressof(values),
            moments=None if moments is None else moments.data_ptr(),
            row_blocks=unpacked.shape[-1] // BLOCK,
            part_moments=moments[0].numel() if moments is not None and has_one_each else 0,
            dtype=DTYPES.index(unpacked.dtype),
            rule=RULES.index(rule),
        )
        self._run_kernel(
            OPERATIONS.index(operation), self._level, ctypes.byref(job), torch.get_num_threads()
        )


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built if need be; None, with one line in the log, if that fails."""
    try:
        return _load_or_build()
    except (build.BuildError, OSError) as error:
        log.warning("C++ kernels are not available (%s); plain PyTorch is used, slower.", error)
        return None


def best_level(compiled: ctypes.CDLL) -> int:
    """Index into `LEVELS` of the most capable instruction set of this processor."""
    return int(compiled.autoquant_best_level())


def _load_or_build() -> ctypes.CDLL:
    shipped = build.shipped_library()
    if build.is_intact(shipped):
        try:
            return ctypes.CDLL(str(shipped))
        except OSError as error:
            log.info("%s does not load here (%s); building it again.", shipped, error)
    cached = build.cached_library()
    if not build.is_intact(cached):
        try:
            cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with FileLock(cached.with_suffix(".lock")):
                if not build.is_intact(cached):
                    build.compile_library(cached)
        except OSError:
            return _built_for_this_process()
    return ctypes.CDLL(str(cached))


def _built_for_this_process() -> ctypes.CDLL:
    """For a cache that cannot be written; a loaded library outlives its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fused.so"
        build.compile_library(path)
        return ctypes.CDLL(str(path))
