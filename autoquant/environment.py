"""Facts of the machine and the installation that a bug report or a run record needs."""

import importlib
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Container, Mapping
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import autoquant
from autoquant.errors import ConfigError

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "optuna",
    "mlflow",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "triton",
    "compressed-tensors",
    "nvidia-modelopt",
    "vllm",
)

VARIABLES = {
    "HF_HOME": "where models and data sets are kept",
    "HF_HUB_CACHE": "where models are kept",
    "HF_HUB_OFFLINE": "1: use only what is on the disk",
    "HF_TOKEN": "access to private and gated models",
    "MLFLOW_TRACKING_URI": "where searches are recorded",
    "CUDA_VISIBLE_DEVICES": "the GPUs that may be used",
    "OMP_NUM_THREADS": "CPU threads of PyTorch and of the kernels",
    "OMP_WAIT_POLICY": "how CPU threads wait for each other, instead of by what others use",
    "ONEDNN_MAX_CPU_ISA": "instruction set that PyTorch's products on the CPU may use",
    "AUTOQUANT_CPU_PRODUCTS": "bf16, or float32 copies, instead of what suits the processor",
    "AUTOQUANT_CACHE": "where digests of weight files are kept, instead of ~/.cache/autoquant",
    "AUTOQUANT_KERNELS": "the kernel backend, instead of the fastest that runs",
    "TRITON_INTERPRET": "1: run the Triton kernels on the CPU",
    "NO_COLOR": "plain output",
}
"""Environment variables that change what a command does, and how."""

_SECRET = frozenset({"HF_TOKEN"})

_CPU_FLAGS = ("avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16")

_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
"""As PyTorch names them: two of x86, one of Arm."""
_ISAS_WITHOUT_BF16 = frozenset(
    {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"}
)
"""Values of `ONEDNN_MAX_CPU_ISA` under which oneDNN, which multiplies BF16 for PyTorch, has no
instructions for it."""


class CpuPolicy(StrEnum):
    """How BF16 tensors on the CPU are multiplied."""

    BF16 = "bf16"
    """As they are."""
    FLOAT32 = "float32"
    """As float32 copies, the product rounded to BF16 once."""


def describe() -> dict[str, Any]:
    """Versions, machine, GPUs and environment variables, secrets redacted."""
    return {
        "autoquant": autoquant.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "machine": machine(),
        "gpus": gpus(),
        "kernels": kernels(),
        "cpu_products": _cpu_products(),
        "variables": variables(os.environ),
    }


def package_versions(names: Container[str] = PACKAGES) -> dict[str, str | None]:
    """Installed version of every package that results depend on; None if it is absent.

    Args:
        names: which of them are asked for.
    """
    return {name: _installed(name) for name in PACKAGES if name in names}


def machine() -> dict[str, Any]:
    """Operating system, processor, cores that this process may use, and memory in bytes."""
    cpuinfo = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    available = frozenset(flags.group(1).split()) if flags else frozenset()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": model.group(1) if model else platform.processor() or None,
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in available],
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory in bytes of every CUDA device that PyTorch sees."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return devices


def kernels() -> dict[str, str]:
    """The kernel backend that serves each kind of device present."""
    import torch
    from autoquant_kernels import active_backend

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {device: active_backend(device) for device in devices}


def cpu_policy(environment: Mapping[str, str]) -> tuple[CpuPolicy, str]:
    """How BF16 tensors on the CPU are to be multiplied, and why, in a few words.

    Raises:
        ConfigError: `AUTOQUANT_CPU_PRODUCTS` names no policy.
    """
    import torch

    chosen = environment.get("AUTOQUANT_CPU_PRODUCTS")
    if chosen:
        if chosen not in list(CpuPolicy):
            raise ConfigError(
                f"AUTOQUANT_CPU_PRODUCTS={chosen} is no way to multiply; there are "
                f"{' and '.join(CpuPolicy)}.",
                fix="unset it, to go by the processor.",
            )
        return CpuPolicy(chosen), "set by AUTOQUANT_CPU_PRODUCTS"
    capabilities = torch.cpu.get_capabilities()
    found = next((name for name in _BF16_INSTRUCTIONS if capabilities.get(name)), None)
    if found is None:
        return CpuPolicy.FLOAT32, "the processor has no BF16 instructions"
    limit = environment.get("ONEDNN_MAX_CPU_ISA", "")
    if limit.lower() in _ISAS_WITHOUT_BF16:
        return CpuPolicy.FLOAT32, f"ONEDNN_MAX_CPU_ISA={limit} keeps PyTorch from {found}"
    return CpuPolicy.BF16, f"the processor has {found}"


def _cpu_products() -> dict[str, str]:
    policy, reason = cpu_policy(os.environ)
    return {"policy": str(policy), "reason": reason}


def measuring_on(device: "torch.device") -> dict[str, str]:
    """What decides the last digits of a measurement on `device`: versions, machine, products."""
    import torch
    from autoquant_kernels import active_backend

    is_cuda = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if is_cuda else machine()["cpu"]
    return {
        "autoquant": autoquant.__version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "kernels": active_backend(device),
        "device": f"{device.type} ({processor})" if processor else device.type,
        **({} if is_cuda else {"products": str(cpu_policy(os.environ)[0])}),
    }


def variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Value of every variable that matters, None if unset; no secret is shown."""
    return {
        name: "set" if name in _SECRET and name in environment else redact(environment.get(name))
        for name in VARIABLES
    }


def redact(uri: str | None) -> str | None:
    """`uri` without the user and password that it may carry."""
    return None if uri is None else re.sub(r"(://)[^/@]+@", r"\1***@", uri)


def git_commit() -> str | None:
    """Commit of the checkout that AutoQuant runs from, `+` if edited; None outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return f"{commit}+" if _git(root, "status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def modelopt(module: str) -> Any:
    """A module of NVIDIA ModelOpt, `torch.quantization` for one; the first takes seconds.

    Raises:
        ConfigError: it is not installed, or does not work with what is.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="transformers .* is not tested")
        return extra(f"modelopt.{module}", "modelopt", title="NVIDIA ModelOpt")


def extra(module: str, name: str, *, title: str) -> Any:
    """A module that an extra of AutoQuant brings.

    Args:
        module: its name.
        name: of the extra.
        title: what the program is called.

    Raises:
        ConfigError: it is not installed, or does not work with what is.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{title} cannot be imported: {error}.",
            fix=f"install it with AutoQuant's extra: pip install 'autoquant[{name}]'.",
        ) from error
