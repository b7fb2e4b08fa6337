"""Single tensors of a checkpoint, read from their byte ranges."""

from collections.abc import Iterator, Mapping
from typing import IO

import torch
from torch import Tensor

from autoquant.errors import SourceError
from autoquant.source.headers import BlockScale, TensorHeader

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

PIECE_BYTES = 1 << 20
"""Read and written at once: small enough to stay in a processor's cache on its way."""


def read_tensor(header: TensorHeader) -> Tensor:
    """The tensor in the dtype of its header, in memory of its own.

    Raises:
        SourceError: the file has become shorter or unreadable since its header was read.
    """
    stored = _read_bytes(header)
    if header.block_scale is not None:
        codes = stored.view(torch.float8_e4m3fn).view(header.shape)
        return _dequantize_blocks(codes, header.block_scale)
    numbers = stored.view(TORCH_DTYPES[header.dtype])
    if header.columns is None:
        return numbers.view(header.shape)
    first, rows = header.columns.first, header.shape[0]
    return numbers.view(header.columns.stored)[:, first : first + rows].t().contiguous()


def _dequantize_blocks(codes: Tensor, blocks: BlockScale) -> Tensor:
    """Codes [N, K] times the scale of their block, in float32, rounded once to BF16.

    The arithmetic of `weight_dequant` in DeepSeek-V3's `inference/kernel.py`.
    """
    scale = read_tensor(blocks.header).float()
    for axis, size in enumerate(blocks.block):
        scale = scale.repeat_interleave(size, dim=axis).narrow(axis, 0, codes.shape[axis])
    return codes.float().mul_(scale).to(torch.bfloat16)


def _read_bytes(header: TensorHeader) -> Tensor:
    size = header.end - header.begin
    buffer = torch.empty(size, dtype=torch.uint8)
    view = buffer.numpy().data
    try:
        with header.file.open("rb", buffering=0) as stream:
            stream.seek(header.begin)
            filled = 0
            while filled < size:
                count = stream.readinto(view[filled:])
                if not count:
                    raise _changed(header)
                filled += count
    except OSError as error:
        raise _unreadable(header, error) from error
    return buffer


def copy_bytes(header: TensorHeader, target: IO[bytes]) -> None:
    """Append the stored bytes of a tensor to `target`, a MiB at a time.

    Raises:
        SourceError: the file has become shorter or unreadable since its header was read.
        OSError: `target` cannot be written.
    """
    for piece in _pieces(header):
        target.write(piece)


def _pieces(header: TensorHeader) -> Iterator[memoryview]:
    """The tensor's bytes in order; a piece is valid until the next one is asked for."""
    if not header.is_plain:
        yield read_tensor(header).reshape(-1).view(torch.uint8).numpy().data
        return
    buffer = memoryview(bytearray(min(header.bytes, PIECE_BYTES)))
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
