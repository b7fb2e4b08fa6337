"""Write a safetensors file tensor by tensor, in the memory of one."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from autoquant.export.layouts.base import StoredTensor
from autoquant.source.headers import DTYPE_BYTES, TensorHeader
from autoquant.source.tensors import PIECE_BYTES, TORCH_DTYPES, copy_bytes

_LENGTH_BYTES = 8
_ALIGNMENT = 8


class ShardWriter:
    """A safetensors file whose tensors are known beforehand and arrive in any order.

    Wider dtypes come first, so that every tensor is aligned to its dtype.

    Args:
        path: the file to create.
        tensors: all that it will hold.
        metadata: free text of its header.
    """

    def __init__(
        self, path: Path, tensors: Iterable[StoredTensor], metadata: Mapping[str, str]
    ) -> None:
        ordered = sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        position, spans = 0, {}
        for tensor in ordered:
            end = position + math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            spans[tensor.name] = (position, end)
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self.data_bytes = position
        self._base = _LENGTH_BYTES + len(text)
        self._spans = spans
        self._missing = set(spans)
        self._dtypes = {tensor.name: TORCH_DTYPES[tensor.dtype] for tensor in ordered}
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        self._file.truncate(self._base + position)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                if self._missing:
                    raise ValueError(f"tensors were never written: {sorted(self._missing)[:3]}")
                self._file.flush()
                os.fsync(self._file.fileno())

    def put(self, name: str, tensor: Tensor) -> None:
        """Store `tensor`, which has the dtype and the size that were announced."""
        content = tensor.detach().cpu().contiguous()
        if content.dtype != self._dtypes[name]:
            raise ValueError(f"{name} was announced as {self._dtypes[name]}, got {content.dtype}")
        self._seek(name, content.numel() * content.element_size())
        stored = content.reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(stored), PIECE_BYTES):
            self._file.write(stored[begin : begin + PIECE_BYTES])

    def copy(self, source: TensorHeader) -> None:
        """Store a tensor of another checkpoint as its bytes are."""
        self._seek(source.name, source.bytes)
        copy_bytes(source, self._file)

    def _seek(self, name: str, size: int) -> None:
        begin, end = self._spans[name]
        if size != end - begin:
            raise ValueError(f"{name} was announced with {end - begin} bytes, got {size}")
        self._missing.remove(name)
        self._file.seek(self._base + begin)
