"""Single tensors of a checkpoint, read from their byte ranges."""

from collections.abc import Iterator, Mapping
from typing import IO

import torch
from torch import Tensor

from autoquant.checkpoint.headers import TensorHeader
from autoquant.errors import SourceError

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}

_COPY_BYTES = 16 << 20


def read_tensor(header: TensorHeader) -> Tensor:
    """The tensor in its stored dtype, in memory of its own.

    Raises:
        SourceError: the file has become shorter or unreadable since its header was read.
    """
    buffer = torch.empty(header.bytes, dtype=torch.uint8)
    view = buffer.numpy().data
    try:
        with header.file.open("rb", buffering=0) as stream:
            stream.seek(header.begin)
            filled = 0
            while filled < header.bytes:
                count = stream.readinto(view[filled:])
                if not count:
                    raise _changed(header)
                filled += count
    except OSError as error:
        raise _unreadable(header, error) from error
    return buffer.view(TORCH_DTYPES[header.dtype]).view(header.shape)


def copy_bytes(header: TensorHeader, target: IO[bytes]) -> None:
    """Append the stored bytes of a tensor to `target`, a few MiB at a time.

    Raises:
        SourceError: the file has become shorter or unreadable since its header was read.
        OSError: `target` cannot be written.
    """
    for piece in _pieces(header):
        target.write(piece)


def _pieces(header: TensorHeader) -> Iterator[memoryview]:
    """The stored bytes in order; a piece is valid until the next one is asked for."""
    buffer = memoryview(bytearray(min(header.bytes, _COPY_BYTES)))
    left = header.bytes
    try:
        with header.file.open("rb", buffering=0) as stream:
            stream.seek(header.begin)
            while left:
                count = stream.readinto(buffer[:left])
                if not count:
                    raise _changed(header)
                yield buffer[:count]
                left -= count
    except OSError as error:
        raise _unreadable(header, error) from error


def _changed(header: TensorHeader) -> SourceError:
    return SourceError(
        f"{header.file} ended inside {header.name}: it changed while it was read.",
        fix="let nothing write to the model while it is read.",
    )


def _unreadable(header: TensorHeader, error: OSError) -> SourceError:
    return SourceError(
        f"{header.name} cannot be read from {header.file}: {error.strerror or error}.",
        fix="check the disk and the permissions.",
    )
