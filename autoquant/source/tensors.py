"""Single tensors of a checkpoint, read from their byte ranges."""

from collections.abc import Iterator, Mapping
from typing import IO

import torch
from torch import Tensor

from autoquant.errors import SourceError
from autoquant.source.headers import PACKED_DTYPES, Inside, Scales, TensorHeader

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
    stored, spelled = _read_bytes(header), header.stored_dtype or header.dtype
    shape = header.shape if header.inside is None else header.inside.stored
    if header.scales is not None:
        tensor = _dequantized(stored, spelled, shape, header.scales)
    else:
        tensor = stored.view(TORCH_DTYPES[spelled]).view(shape)
    if header.inside is not None:
        tensor = _part(tensor, header.inside, header.shape[0])
    return tensor.to(TORCH_DTYPES[header.dtype])


def _part(stored: Tensor, inside: Inside, rows: int) -> Tensor:
    axis = 1 if inside.transposed else 0
    part = stored.narrow(axis, inside.first, rows)
    return (part.t() if inside.transposed else part).contiguous()


def _dequantized(stored: Tensor, spelled: str, shape: tuple[int, ...], scales: Scales) -> Tensor:
    """Codes times the scale of their block, in float32, rounded once to BF16.

    The arithmetic of `weight_dequant` in DeepSeek-V3's `inference/kernel.py`. Where the scale is a
    power of two nothing is lost, unless a product leaves BF16's range.
    """
    if scales.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    numbers = _numbers(stored, spelled).view(shape)
    scale = _scale_numbers(scales.header).reshape(
        [-(-n // size) for n, size in zip(shape, scales.block, strict=True)]
    )
    for axis, size in enumerate(scales.block):
        if scale.shape[axis] > 1:
            scale = scale.repeat_interleave(size, dim=axis).narrow(axis, 0, shape[axis])
    weight = numbers.mul_(scale).to(torch.bfloat16)
    return weight.transpose(-1, -2).contiguous() if scales.transposed else weight


def _numbers(stored: Tensor, spelled: str) -> Tensor:
    """What codes stand for, float32."""
    if spelled not in PACKED_DTYPES:
        return stored.view(TORCH_DTYPES[spelled]).float()
    halves = torch.stack([stored & 15, stored >> 4], dim=-1).flatten()
    return _E2M1.index_select(0, halves.int())


_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_E2M1 = torch.cat([_E2M1, -_E2M1])
"""Numbers of the 4-bit codes, the sign in their highest bit."""


def _scale_numbers(header: TensorHeader) -> Tensor:
    """Scales in float32; bytes are the exponents of powers of two, as OCP's MX formats have it."""
    scale = read_tensor(header)
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()


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


def are_equal(one: TensorHeader, other: TensorHeader) -> bool:
    """Whether two tensors hold the same bytes in the same dtype and shape; reads as far as they do.

    Raises:
        SourceError: a file has become shorter or unreadable since its header was read.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if not (one.is_plain and other.is_plain):
        return torch.equal(read_tensor(one), read_tensor(other))
    return all(a == b for a, b in zip(_pieces(one), _pieces(other), strict=True))


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
