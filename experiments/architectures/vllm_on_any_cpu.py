"""Run a script with the published wheel of vLLM, which is built for GPUs, on any CPU.

    python vllm_on_any_cpu.py SCRIPT ARGUMENT...

vLLM's kernels for CPUs, and the backends that multiply experts without a gate, are missing there.
They compute; they neither create parameters nor load them. Replaced is only what would choose them,
so that configs, names, methods and the loader stay vLLM's own. A model of which the loader leaves
parameters as they were is refused.
"""

import os
import runpy
import sys
import unittest.mock
from collections.abc import Callable
from typing import Any

import torch
from complete import load_all

for flag in ("VLLM_KIMI_K3_GEMM_AR", "VLLM_ENABLE_GEMM_RS"):  # their kernels import CUTLASS
    os.environ[flag] = "0"

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


def without_prefix_caching(cls: type, vllm_config: Any) -> None:
    """Undo what prefix caching chose where the platform turns it off, as it does for MLA."""
    checked_config(cls, vllm_config)
    cache = vllm_config.cache_config
    if not cache.enable_prefix_caching:
        cache.mamba_block_size = None


class OfGpu:
    """A stream of a GPU, or an event that orders some; models make them while they are built."""

    def __init__(self, *arguments: object, **named: object) -> None: ...


chosen_backend = CpuPlatform.get_attn_backend_cls.__func__
CpuPlatform.get_attn_backend_cls = classmethod(dense_backend)
checked_config = CpuPlatform.check_and_update_config.__func__
CpuPlatform.check_and_update_config = classmethod(without_prefix_caching)
torch.cuda.Event = torch.cuda.Stream = OfGpu
vllm.platforms._current_platform = CpuPlatform()

with unittest.mock.patch.object(CpuPlatform, "is_cpu", return_value=False):
    import vllm.models.deepseek_v4  # the class for NVIDIA's GPUs
    from vllm.models.deepseek_v4.nvidia import flashinfer_sparse, flashmla

from vllm.model_executor.layers.fused_moe import config, unquantized_fused_moe_method  # noqa: E402
from vllm.model_executor.layers.fused_moe.oracle.unquantized import (  # noqa: E402
    UnquantizedMoeBackend,
)
from vllm.model_executor.layers.mamba.gdn import olmo_gdn_linear_attn  # noqa: E402
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402
from vllm.triton_utils import triton  # noqa: E402


class WithExpertsOfGpus(CpuPlatform):
    """Lets a config of experts pass that has no gate."""

    def is_cuda_alike(self) -> bool:
        return True


def inspect_here(work: Callable[[], Any]) -> Any:
    """Import a model's class in this process, since another one would lack what is above."""
    return work()


def load_every_parameter(self: Any, model: torch.nn.Module, model_config: Any) -> None:
    load_all(model, lambda: load_weights(self, model, model_config))


load_weights = DefaultModelLoader.load_weights
DefaultModelLoader.load_weights = load_every_parameter
for attention in (flashmla, flashinfer_sparse):  # asks which GPU multiplies
    attention.compute_fp8_einsum_recipe = lambda: ((1, 128, 128), False)
config.current_platform = WithExpertsOfGpus()
unquantized_fused_moe_method.select_unquantized_moe_backend = lambda **arguments: (
    UnquantizedMoeBackend.TRITON,
    None,
)
registry._run_in_subprocess = inspect_here
torch.library.define("_C::convert_weight_packed", "(Tensor weight) -> Tensor")  # for a kernel
torch.library.impl("_C::convert_weight_packed", "CPU", lambda weight: weight)
# vLLM 0.33 asks for a convolution's place in the joined one and does not hand it over
olmo_gdn_linear_attn._make_fused_conv1d_weight_loader = lambda *sizes: (
    lambda convolution, *tensors: convolution.data.zero_()
)
triton.set_allocator = lambda allocator: None  # of kernels' memory; the placeholder lacks it

sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
