"""Run a script with the published wheel of vLLM, which is built for GPUs, on any CPU.

    python vllm_on_any_cpu.py SCRIPT ARGUMENT...

vLLM's kernels for CPUs, and the backends that multiply experts without a gate, are missing there.
They compute; they neither create parameters nor load them. Replaced is only what would choose them,
so that configs, names, methods and the loader stay vLLM's own.
"""

import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch

torch.cpu._is_amx_tile_supported = lambda: False
torch.cpu._is_avx512_bf16_supported = lambda: False

for operator in ("nms", "qnms"):  # a torchvision for GPUs declares them in a library it cannot load
    torch.library.define(
        f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )

import vllm.platforms  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402


def dense_backend(cls: type, selected_backend: Any, attn_selector_config: Any, **named: Any) -> str:
    """The backend of attention that reads everything: sparse attention has none on a CPU."""
    config = attn_selector_config._replace(use_sparse=False)
    return chosen_backend(cls, selected_backend, config, **named)


chosen_backend = CpuPlatform.get_attn_backend_cls.__func__
CpuPlatform.get_attn_backend_cls = classmethod(dense_backend)
vllm.platforms._current_platform = CpuPlatform()

from vllm.model_executor.layers.fused_moe import config, unquantized_fused_moe_method  # noqa: E402
from vllm.model_executor.layers.fused_moe.oracle.unquantized import (  # noqa: E402
    UnquantizedMoeBackend,
)
from vllm.model_executor.models import registry  # noqa: E402


class WithExpertsOfGpus(CpuPlatform):
    """Lets a config of experts pass that has no gate."""

    def is_cuda_alike(self) -> bool:
        return True


def inspect_here(work: Callable[[], Any]) -> Any:
    """Import a model's class in this process, since another one would lack what is above."""
    return work()


config.current_platform = WithExpertsOfGpus()
unquantized_fused_moe_method.select_unquantized_moe_backend = lambda **arguments: (
    UnquantizedMoeBackend.TRITON,
    None,
)
registry._run_in_subprocess = inspect_here

sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
