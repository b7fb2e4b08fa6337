"""Open a causal language model in BF16 for measurement."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant import collector
from autoquant.data.tokenizer import load_tokenizer
from autoquant.errors import AutoQuantError, ConfigError, OutOfMemory, SourceError, first_line
from autoquant.model import experts
from autoquant.model.streaming.blocks import Absent, BlockReader, Unread, by_block, require_finite
from autoquant.model.streaming.placement import ANYTHING, Allowance, Left, Sizes, open_store
from autoquant.model.streaming.shared import ALONE, Peers
from autoquant.model.streaming.stores import BlockStore
from autoquant.source.architecture import auto_class
from autoquant.source.declared import QUANTIZATION
from autoquant.source.extent import Extent
from autoquant.source.headers import TensorHeader
from autoquant.source.source import Source, open_source


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready for scoring: BF16, evaluation mode, our experts' forward."""

    model: Any
    tokenizer: Any
    device: torch.device
    store: BlockStore
    """Brings the weights of blocks into the model."""
    left: Left
    """Memory for what forwards leave between blocks, where blocks are streamed."""
    max_length: int
    """Longest sequence that the position embedding was made for."""


def choose_device(device: str | None) -> torch.device:
    """The device asked for, or a GPU, or the CPU; `cuda` is each process's own GPU.

    Raises:
        ConfigError: a device that this machine or this torch does not have.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = _own_gpu() if device == "cuda" else torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used: {first_line(error)}",
            fix="pass --device cpu, or leave it out.",
        ) from error
    return chosen


def _own_gpu() -> torch.device:
    """The GPU of this process, by its number on the machine where a launcher gives it one.

    A launcher may also show each process its own GPU alone.

    Raises:
        RuntimeError: the machine has fewer GPUs than processes.
    """
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count <= 1 or "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")
    if number >= count:
        raise RuntimeError(f"this is process {number} of a machine with {count} GPUs")
    return torch.device("cuda", number)


def load_model(
    path: Path,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    allowance: Allowance = ANYTHING,
    tokenizer: Any = None,
    peers: Peers = ALONE,
) -> LoadedModel:
    """Load model and tokenizer from a local folder.

    Args:
        path: the folder.
        device: what the model computes on.
        trust_remote_code: run code that comes with the model.
        allowance: where the weights of blocks may be.
        tokenizer: takes the place of the folder's.
        peers: the processes of a run, all of which load the model now.

    Raises:
        SourceError: no such architecture, no tokenizer, weights that do not fit the config, or a
            weight that is NaN or infinite; of streamed blocks when they are first opened.
        OutOfMemory: the weights do not fit the device, or what of it may be used.
    """
    from transformers.utils import logging

    experts.register()
    collector.resume()  # most of what transformers imports is there now
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = open_source(path)
    extent = Extent.of(source.headers)
    extent.require_layers(source.config)
    with _loading_errors(path, device):
        config = _read_config(path, trust_remote_code)
    if tokenizer is None:
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    with _loading_errors(path, device):
        shape = _empty(config, extent, trust_remote_code)
        outside, inside = by_block(shape, source.headers.to_write(()))
        model, report = _filled(shape, outside, chain.from_iterable(inside))
    _check_complete(path, report)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # pinned memory belongs to the GPU in force
    with _loading_errors(path, device):
        _move(model.eval().requires_grad_(False), device)
        require_finite({n: p for n, p in model.named_parameters() if not p.is_meta})
        reader = BlockReader(shape, inside)
        store, left = open_store(model, reader, device, allowance, peers)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation(experts.IMPLEMENTATION)
    model.config.use_cache = False
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        device=device,
        store=store,
        left=left,
        max_length=_max_length(model.config.get_text_config()),
    )


def sizes_of(source: Source, *, trust_remote_code: bool = False) -> Sizes:
    """Memory that a model's weights take, by its headers and its architecture alone.

    Raises:
        SourceError: no such architecture, or headers that do not fit the config.
    """
    extent = Extent.of(source.headers)
    extent.require_layers(source.config)
    with _loading_errors(source.path, torch.device("meta")):
        shape = _empty(_read_config(source.path, trust_remote_code), extent, trust_remote_code)
        _, inside = by_block(shape, source.headers.to_write(()))
        reader = BlockReader(shape, inside)
        held = sum(t.numel() * t.element_size() for t in (*shape.parameters(), *shape.buffers()))
        sizes = Sizes.of(shape, reader, outside=held)
    return replace(sizes, outside=held - sum(sizes.blocks))


@contextmanager
def _loading_errors(path: Path, device: torch.device) -> Iterator[None]:
    try:
        yield
    except AutoQuantError:
        raise
    except Exception as error:  # model code and remote code raise anything
        if _is_out_of_memory(error):
            raise OutOfMemory(
                f"{path} does not fit the memory of {device}: {first_line(error)}",
                fix="use a larger machine or device.",
            ) from error
        raise SourceError(
            f"transformers cannot load {path}: {first_line(error)}",
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
        empty: Any = auto_class(config).from_config(
            config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code
        )
    extent.require_elements(empty)
    return empty


def _filled(
    empty: Any, outside: Iterable[TensorHeader], inside: Iterable[TensorHeader]
) -> tuple[Any, dict[str, Any]]:
    """The model in BF16 without the content of its blocks, and what transformers says of it.

    The weights are those of the headers, which export and verify read too, and are read rather than
    mapped: a file that is cut off under a mapping ends the process without a word.
    """
    content = {header.name: Unread(header) for header in outside}
    loaded: tuple[Any, dict[str, Any]] = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict=content | {header.name: Absent(header) for header in inside},
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    return loaded


def _move(model: Any, device: torch.device) -> None:
    """Bring what is outside of all blocks to the device, tied weights once."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                own = moved.setdefault(
                    id(parameter), nn.Parameter(parameter.to(device), requires_grad=False)
                )
                module._parameters[name] = own
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def _max_length(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch's CPU allocator has no exception type of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "DefaultCPUAllocator" in str(error)
    )


def _check_complete(path: Path, report: dict[str, Any]) -> None:
    missing = sorted(report.get("missing_keys") or ())
    mismatched = sorted(str(key) for key in report.get("mismatched_keys") or ())
    if missing or mismatched:
        raise SourceError(
            f"{path}: {len(missing)} weights of the architecture are not in the checkpoint and "
            f"{len(mismatched)} have another shape, first {(missing + mismatched)[0]}.",
            fix="check that config.json belongs to these weights.",
        )
