"""Names, dtypes, shapes and byte ranges of safetensors files, read without their weights.

Format: https://huggingface.co/docs/safetensors. Eight bytes hold the header's length N (little
endian), N bytes hold a JSON object, and the tensors follow without gaps.
"""

import itertools
import math
import operator
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from autoquant.errors import SourceError
from autoquant.parsing import Unreadable, decode, parse_json

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}

PACKED_DTYPES: Mapping[str, int] = {"F4": 2}
"""Dtypes of which a byte holds several numbers, with how many; shapes count the numbers."""

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""

_LENGTH_BYTES = 8
_TOO_LARGE = 2**64
_METADATA = "__metadata__"
_DOWNLOAD_AGAIN = "download or save the file again."


@dataclass(frozen=True, slots=True)
class Inside:
    """Where a matrix [N, K] lies inside a stored one: `stored[first:first + N]`, or the transpose
    of `stored[:, first:first + N]`.
    """

    stored: tuple[int, int]
    """Shape of the stored matrix: [at least N, K], or [K, at least N]."""
    first: int
    transposed: bool


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a weight that is stored as codes: number = code x scale of its block."""

    header: "TensorHeader"
    """One scale for each block: the codes' shape over `block`, rounded up; float32, BF16, FP16, or
    the exponents of powers of two (`F8_E8M0`, also spelled `U8`)."""
    block: tuple[int, ...]
    """Codes along each axis that share a scale."""
    transposed: bool = False
    """Whether codes and scales are of the weight with its last two axes exchanged."""
    are_powers: bool = False
    """Whether every scale is a power of two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """One tensor of a checkpoint, and where its bytes are."""

    name: str
    dtype: str
    """safetensors spelling: `BF16`, `I64`, ...; of codes and wider numbers what they stand for."""
    shape: tuple[int, ...]
    file: Path
    """The safetensors file that holds it."""
    begin: int
    """Offset of the first byte, from the start of the file."""
    end: int
    """Offset behind the last byte, from the start of the file."""
    inside: Inside | None = None
    """How the bytes between `begin` and `end` hold the tensor, where they hold more, or its
    transpose."""
    stored_dtype: str | None = None
    """How the file spells the numbers or codes, where that is not `dtype`; `F4` for two E2M1 codes
    a byte, the even one in the low half, whatever the file calls the bytes."""
    scales: Scales | None = None
    """Of a weight that is stored as codes."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """What the tensor takes in its dtype."""
        return self.elements * DTYPE_BYTES[self.dtype]

    @property
    def is_plain(self) -> bool:
        """Whether the bytes between `begin` and `end` are the tensor's own."""
        return self.inside is None and self.stored_dtype is None


def stored_bytes(tensors: Iterable[TensorHeader]) -> int:
    """Bytes of some tensors as the files hold them, scales of codes included, each once."""
    own = list(tensors)
    scales = (tensor.scales.header for tensor in own if tensor.scales is not None)
    ranges = {(t.file, t.begin, t.end) for t in itertools.chain(own, scales)}
    return sum(end - begin for _, begin, end in ranges)


def by_file(tensors: Iterable[TensorHeader]) -> dict[Path, list[TensorHeader]]:
    """Tensors of each file, in their order."""
    found: dict[Path, list[TensorHeader]] = {}
    for tensor in tensors:
        found.setdefault(tensor.file, []).append(tensor)
    return found


@dataclass(frozen=True, kw_only=True)
class Headers:
    """Every tensor of a checkpoint by name, in the order of its files and byte ranges.

    The tensors are those that the layers compute with: weights of experts that a file holds as one
    tensor are apart, and codes with scales are the weights that they stand for.
    """

    tensors: Mapping[str, TensorHeader] = field(repr=False)
    metadata: Mapping[Path, Mapping[str, str]]
    """Free-text metadata of each file; its keys are the files, in the order of their names."""
    joined: Mapping[str, TensorHeader] = field(default_factory=dict, repr=False)
    """Stored 3-D tensors of experts by the name of each of their parts."""

    @classmethod
    def read(cls, files: tuple[Path, ...]) -> Self:
        """Read the headers of `files`.

        Raises:
            SourceError: a damaged file, or one tensor in two files.
        """
        return cls.of((file, *read_file_header(file)) for file in files)

    @classmethod
    def of(cls, parts: Iterable[tuple[Path, Iterable[TensorHeader], Mapping[str, str]]]) -> Self:
        """Join the tensors and the metadata of several files.

        Raises:
            SourceError: one tensor in two files.
        """
        tensors: dict[str, TensorHeader] = {}
        metadata: dict[Path, Mapping[str, str]] = {}
        for file, entries, text in parts:
            metadata[file] = text
            for entry in entries:
                if entry.name in tensors:
                    raise SourceError(
                        f"tensor {entry.name} is in {tensors[entry.name].file.name} "
                        f"and in {file.name}: a tensor is stored once.",
                        fix="remove the file that does not belong to this checkpoint.",
                    )
                tensors[entry.name] = entry
        return cls(tensors=tensors, metadata=metadata)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.metadata)

    @cached_property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors.values())

    @cached_property
    def bytes(self) -> int:
        """Bytes of all tensors in their dtypes, the files' own headers excluded."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of all tensor data as the files hold it, scales of codes included."""
        return stored_bytes(self)

    def to_write(self, changed: Container[str]) -> Iterator[TensorHeader]:
        """The tensors in file order, with joined ones whole where no part of any is changed.

        SGLang 0.5.23 reads no expert of its own behind the first joined tensor, and does not say so
        (`is_fused_expert` of its Qwen3-VL-MoE and Qwen3.5).
        """
        are_apart = any(part in changed for part in self.joined)
        written: set[str] = set()
        for tensor in self:
            whole = self.joined.get(tensor.name)
            if whole is None or are_apart:
                yield tensor
            elif whole.name not in written:
                written.add(whole.name)
                yield whole

    def __getitem__(self, name: str) -> TensorHeader:
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[TensorHeader]:
        return iter(self.tensors.values())

    def __len__(self) -> int:
        return len(self.tensors)


def read_file_header(file: Path) -> tuple[list[TensorHeader], dict[str, str]]:
    """The tensors of one file in byte order, and the file's metadata.

    Raises:
        SourceError: the file is unreadable, truncated, or breaks the format.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > LARGEST_HEADER:
                raise _damaged(
                    file,
                    f"promises a header of {length:,} bytes; at most {LARGEST_HEADER:,} can be",
                )
            if _LENGTH_BYTES + length > size:
                raise _damaged(
                    file, f"is truncated: its header has {length:,} bytes, the file {size:,}"
                )
            text = stream.read(length)
    except OSError as error:
        raise SourceError(
            f"{file} cannot be read: {error.strerror or error}.",
            fix="check the path, its permissions and the disk.",
        ) from error
    header = _parse(file, text)
    metadata = header.pop(_METADATA, None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, f"has a {_METADATA} that is not a mapping of text to text")
    base = _LENGTH_BYTES + length
    entries = [tensor_header(file, name, value, base) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _require_no_gaps(file, entries, base, size)
    return entries, metadata


def _parse(file: Path, content: bytes) -> dict[str, Any]:
    """The header's object, by the rules of serde_json, which the safetensors library reads with.

    It takes no byte order mark, no `NaN`, and no `-0` for an integer, all of which Python's takes.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise _damaged(file, f"names {name} twice in its header")
            found[name] = value
        return found

    def refused(word: str) -> Any:
        raise Unreadable(f"is not JSON: {word}")

    try:
        header = parse_json(
            decode(content),
            object_pairs_hook=unique,
            parse_int=lambda text: -0.0 if text == "-0" else int(text),
            parse_constant=refused,
        )
    except Unreadable as error:
        raise _damaged(file, f"has a header that {error}") from error
    if not isinstance(header, dict):
        raise _damaged(file, "has a header that is not a JSON object")
    return header


def tensor_header(file: Path, name: str, value: Any, base: int) -> TensorHeader:
    """One entry of a header's JSON, whose offsets count from byte `base` of the file.

    Raises:
        SourceError: something is missing or too much, or the numbers do not fit each other.
    """
    match value:
        case {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}:
            pass  # what else it says is left alone, as by the safetensors library
        case _:
            raise _damaged(file, f"describes {name} by other than dtype, shape and data_offsets")
    if not isinstance(dtype, str) or dtype not in {*DTYPE_BYTES, *PACKED_DTYPES}:
        raise SourceError(
            f"{file}: tensor {name} has dtype {dtype!r}, which is not one of "
            f"{', '.join((*DTYPE_BYTES, *PACKED_DTYPES))}.",
            fix="save the model in bfloat16.",
        )
    numbers = (*shape, begin, end)
    if not all(type(number) is int and 0 <= number < _TOO_LARGE for number in numbers):
        raise _damaged(file, f"gives {name} shape {shape} and offsets {begin}, {end}")
    products = itertools.accumulate((*shape, DTYPE_BYTES.get(dtype, 1)), operator.mul)
    if any(product >= _TOO_LARGE for product in products):  # also on the way to a zero
        raise _damaged(file, f"gives {name} a shape of more than 2^64 bytes, {shape}")
    needed = data_bytes(dtype, math.prod(shape))
    if end - begin != needed:
        raise _damaged(
            file,
            f"gives {name} {end - begin:,} bytes; {dtype} {shape} takes {needed:,}",
        )
    return TensorHeader(
        name=name, dtype=dtype, shape=tuple(shape), file=file, begin=base + begin, end=base + end
    )


def data_bytes(dtype: str, elements: int) -> int:
    """Bytes of so many numbers in a dtype of safetensors."""
    per_byte = PACKED_DTYPES.get(dtype)
    return elements * DTYPE_BYTES[dtype] if per_byte is None else -(-elements // per_byte)


def _require_no_gaps(file: Path, entries: list[TensorHeader], base: int, size: int) -> None:
    position = base
    for entry in entries:
        if entry.begin < position:
            raise _damaged(file, f"has tensors that overlap at {entry.name}")
        if entry.begin > position:
            raise _damaged(file, f"leaves {entry.begin - position:,} unused bytes at {entry.name}")
        position = entry.end
    if position > size:
        raise _damaged(
            file, f"is truncated: its tensors end at byte {position:,}, the file at {size:,}"
        )
    if position < size:
        raise _damaged(file, f"has {size - position:,} bytes behind its last tensor")


def _damaged(file: Path, what: str) -> SourceError:
    return SourceError(f"{file} {what}.", fix=_DOWNLOAD_AGAIN)
