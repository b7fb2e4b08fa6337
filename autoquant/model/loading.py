"""Open a causal language model in BF16 for measurement."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoquant.data.tokenizer import load_tokenizer
from autoquant.errors import ConfigError, OutOfMemory, SourceError
from autoquant.model import experts
from autoquant.source.architecture import auto_class
from autoquant.source.declared import QUANTIZATION
from autoquant.source.extent import Extent
from autoquant.source.headers import TensorHeader
from autoquant.source.source import Source, open_source
from autoquant.source.tensors import read_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready for scoring: BF16, evaluation mode, our experts' forward."""

    model: Any
    tokenizer: Any
    device: torch.device
    max_length: int
    """Longest sequence that the position embedding was made for."""


def choose_device(device: str | None) -> torch.device:
    """The device asked for, or the first GPU, or the CPU.

    Raises:
        ConfigError: a device that this machine or this torch does not have.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used: {_one_line(error)}",
            fix="pass --device cpu, or leave it out.",
        ) from error
    return chosen


def load_model(path: Path, device: torch.device, *, trust_remote_code: bool = False) -> LoadedModel:
    """Load model and tokenizer from a local folder.

    Raises:
        SourceError: no such architecture, no tokenizer, weights that do not fit the config, or a
            weight that is NaN or infinite.
        OutOfMemory: the weights do not fit the device.
    """
    from transformers.utils import logging

    experts.register()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = open_source(path)
    extent = Extent.of(source.headers)
    extent.require_layers(source.config)
    with _loading_errors(path, device):
        config = _read_config(path, trust_remote_code)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    with _loading_errors(path, device):
        model, report = _filled(_empty(config, extent, trust_remote_code), source)
        model = model.to(device).eval().requires_grad_(False)
    _check_complete(path, report)
    _check_finite(model)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation(experts.IMPLEMENTATION)
    model.config.use_cache = False
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        device=device,
        max_length=_max_length(model.config.get_text_config()),
    )


@contextmanager
def _loading_errors(path: Path, device: torch.device) -> Iterator[None]:
    try:
        yield
    except SourceError:
        raise
    except Exception as error:  # model code and remote code raise anything
        if _is_out_of_memory(error):
            raise OutOfMemory(
                f"{path} does not fit the memory of {device}: {_one_line(error)}",
                fix="use a larger machine or device.",
            ) from error
        raise SourceError(
            f"transformers cannot load {path}: {_one_line(error)}",
            fix="check that config.json names an architecture of this transformers version; "
            "pass --trust-remote-code if its code comes with the model.",
        ) from error


def _read_config(path: Path, trust_remote_code: bool) -> Any:
    """transformers' object of config.json, which asks for plain weights."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(
        path, trust_remote_code=trust_remote_code, local_files_only=True
    )
    if hasattr(config, QUANTIZATION):
        del config.quantization_config
    return config


def _empty(config: Any, extent: Extent, trust_remote_code: bool) -> Any:
    """The model on the meta device, no larger than its weights can fill."""
    with torch.device("meta"), extent.building():
        empty: Any = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    extent.require_elements(empty)
    return empty


def _filled(empty: Any, source: Source) -> tuple[Any, dict[str, Any]]:
    """The model in BF16, and what transformers says of the weights it found.

    The weights are those of the headers, which export and verify read too, and are read rather than
    mapped: a file that is cut off under a mapping ends the process without a word.
    """
    loaded: tuple[Any, dict[str, Any]] = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict={header.name: _Unread(header) for header in source.headers.to_write(())},
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    return loaded


class _Unread:
    """A tensor that is read when transformers asks for its content, as a safetensors slice is."""

    def __init__(self, header: TensorHeader) -> None:
        self._header = header

    def __getitem__(self, index: Any) -> torch.Tensor:
        return read_tensor(self._header)[index]


def _max_length(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch's CPU allocator has no exception type of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "DefaultCPUAllocator" in str(error)
    )


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _check_complete(path: Path, report: dict[str, Any]) -> None:
    missing = sorted(report.get("missing_keys") or ())
    mismatched = sorted(str(key) for key in report.get("mismatched_keys") or ())
    if missing or mismatched:
        raise SourceError(
            f"{path}: {len(missing)} weights of the architecture are not in the checkpoint and "
            f"{len(mismatched)} have another shape, first {(missing + mismatched)[0]}.",
            fix="check that config.json belongs to these weights.",
        )


def _check_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        lowest, highest = torch.aminmax(parameter.detach())
        if not (torch.isfinite(lowest) and torch.isfinite(highest)):
            raise SourceError(
                f"weight {name} holds NaN or Inf.",
                fix="repair or download the checkpoint again; such a model has no KL.",
            )
