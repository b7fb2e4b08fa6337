"""Let SGLang build and load a checkpoint on any CPU, and print the method of every module.

    python sglang_on_any_cpu.py CHECKPOINT    # {"quantization": ..., "modules": {name: method}}

Configs, modules, their names, the method of each and the loader are SGLang's own. Packages that are
not installed (kernels, servers, grammars) are replaced by stand-ins, so that its modules can be
imported; what they compute is never asked for. Weights are loaded, and not packed for a kernel; a
model of which the loader leaves parameters as they were is refused.
"""

import importlib.abc
import importlib.util
import json
import os
import socket
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}

import torch
from complete import load_all

for operator in ("nms", "qnms"):  # a torchvision for GPUs declares them in a library it cannot load
    torch.library.define(
        f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )

import transformers  # noqa: E402

transformers.AutoProcessor, transformers.AutoModel  # noqa: B018  (imported while nothing is replaced)

NOT_NEEDED = {"tvm_ffi", "xgrammar", "llguidance", "outlines", "vllm"}
"""Replaced wherever they are: libraries that they load fail beside stand-ins."""

REPLACED = NOT_NEEDED | {
    name
    for name in (
        *("sgl_kernel", "flashinfer", "cuda", "deep_gemm", "deep_ep", "flash_attn", "flash_mla"),
        *("humming", "cutlass", "tilelang", "quack", "kernels", "nvshmem", "pynvml", "numba"),
        *("torch_memory_saver", "torchcodec", "torchaudio", "timm", "soundfile", "soxr", "av"),
        *("decord", "decord2", "IPython", "datasets", "modelscope", "blobfile", "mistral_common"),
        *("uvicorn", "anthropic", "easydict", "smg_grpc_servicer", "deepseek_recipe", "scipy"),
        *("tml_renderers", "dateutil", "ninja", "py_spy"),
    )
    if importlib.util.find_spec(name) is None
}

UNUSED = {
    "FalconH1ForCausalLM": ("q_norm.weight", "k_norm.weight"),
    "MiniMaxM3SparseForConditionalGeneration": ("post_layernorm.weight", "post_layernorm.bias"),
}
"""Parameters that a class of SGLang makes and never reads."""


class StandIn:
    """Something of a package that is not there: called, indexed, subclassed and annotated with."""

    def __init__(self, *arguments: object, **named: object) -> None: ...

    def __call__(self, *arguments: Any, **named: object) -> Any:
        is_decorated = len(arguments) == 1 and callable(arguments[0]) and not named
        return arguments[0] if is_decorated else StandIn()

    def __getattr__(self, name: str) -> "StandIn":
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()

    def __getitem__(self, index: object) -> "StandIn":
        return self

    def __or__(self, other: object) -> "StandIn":
        return self

    __ror__ = __or__

    def __iter__(self) -> Iterator[object]:
        return iter(())

    def __bool__(self) -> bool:
        return False

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type]:
        return (object,)

    def __get_pydantic_core_schema__(self, *arguments: object) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()


class StandInModule(types.ModuleType):
    """A package of stand-ins."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages that are replaced."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        is_replaced = name.partition(".")[0] in REPLACED
        return ModuleSpec(name, self, is_package=True) if is_replaced else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def loaded(checkpoint: str) -> tuple[str | None, torch.nn.Module]:
    """The quantization that SGLang sees, and the model with its weights."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.rotary_embedding import factory
    from sglang.srt.model_loader import get_model, loader
    from sglang.srt.models import deepseek_v4
    from sglang.srt.runtime_context import SpawnRanks, override_platform, publish
    from sglang.srt.server_args import ServerArgs

    # positions on a CPU are computed for one kind of scaling alone
    factory.get_rope_cpu = lambda *arguments: factory.get_rope(*arguments[:-1])
    deepseek_v4.DeepseekV4ForCausalLM._prewarm_mhc_kernels = lambda model: None
    torch.cuda.get_device_capability = lambda *device: (10, 0)
    load_weights = loader.DefaultModelLoader.load_weights_only
    loader.DefaultModelLoader.load_weights_and_postprocess = staticmethod(
        lambda model, *weights: load_all(
            model, lambda: load_weights(model, *weights), UNUSED.get(type(model).__name__, ())
        )
    )
    arguments = ServerArgs(
        model_path=checkpoint,
        device="cpu",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        disable_radix_cache=True,
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    init_distributed_environment(1, 0, address, 0, backend="gloo")
    initialize_model_parallel(backend="gloo")
    initialize_dp_attention(arguments)
    config = ModelConfig.from_server_args(arguments)
    text = config.hf_text_config
    for heads in ("linear_num_key_heads", "linear_num_value_heads"):
        if hasattr(text, heads):  # SGLang sets it on CPUs where it splits heads over several
            setattr(text, f"{heads}_cpu", getattr(text, heads))
    with override_platform(is_blackwell=True):  # experts ask whether the machine has NVFP4
        model = get_model(
            model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu")
        )
    return config.quantization, model


def method_of(module: torch.nn.Module) -> str | None:
    """The name of what multiplies in the module; None where nothing does."""
    method = getattr(module, "quant_method", None)
    if method is None:
        return None
    scheme = getattr(module, "scheme", None)
    return type(method if scheme is None else scheme).__name__


def main() -> None:
    sys.meta_path.insert(0, StandInFinder())
    torch.set_num_threads(1)
    quantization, model = loaded(sys.argv[1])
    named = {name: method_of(module) for name, module in model.named_modules()}
    modules = {name: method for name, method in named.items() if method is not None}
    print(json.dumps({"quantization": quantization, "modules": modules}, indent=1))


if __name__ == "__main__":
    main()
