"""A receipt: hashes of all that a KL rests on, and the KL, as one JSON file."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoquant.errors import SourceError
from autoquant.files import to_json
from autoquant.store.records import parse_object, read_content, sealed, unsealed

DIRECTION = "KL(BF16 || quantized)"
POSITIONS = "every token of every sequence, full vocabulary, no padding"
UNIT = "nats per token"

CONFIDENCE = 0.95

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""SHA-256 in hex."""


class Part(BaseModel):
    """Values of a receipt, which never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SourceFacts(Part):
    """The model."""

    model: str
    """A hub id, or a folder as it was named."""
    revision: str | None
    digest: str
    """Of config, headers and all contents, `sha256:...`."""
    files: dict[str, Digest]


class CheckpointFacts(Part):
    """What was made of it."""

    files: dict[str, Digest]
    """Weights, config.json and what engines read of the quantization."""
    assignment: str
    """Digest of which group is stored in which format."""
    counts: dict[str, int]
    checkpoint_bytes: int
    bpe: float
    """8 * `checkpoint_bytes` / elements of the source."""


class TokenFacts(Part):
    """What was measured on."""

    digest: str
    """First 16 hex digits of the SHA-256 over every sequence in order."""
    tokens: int
    sequences: int
    unit: str
    """What is independent of each other: documents or passages."""
    units: int


class KlFacts(Part):
    """The distance, and how well it is known."""

    direction: str
    positions: str
    unit: str
    mean: float
    stderr: float
    confidence: float
    low: float
    high: float
    """The interval of the mean, documents resampled."""
    noise_floor: float
    """KL between two BF16 runs."""
    top1_agreement: float


class CodeFacts(Part):
    """The program."""

    autoquant: str
    commit: str | None
    digest: Digest
    """Of every source file of AutoQuant and its kernels."""


class Settings(Part):
    """What else decides the tokens and what is multiplied."""

    calibration: str
    seed: int
    sequence_length: int
    batch_tokens: int
    calibration_tokens: int
    search_tokens: int
    report_tokens: int
    calibrate_all_experts: bool
    target: str
    kv_cache: str


class Receipt(Part):
    """What a checkpoint is, and how far its output is from the model's."""

    source: SourceFacts
    checkpoint: CheckpointFacts
    tokens: TokenFacts
    kl: KlFacts
    settings: Settings
    code: CodeFacts
    versions: dict[str, str | None]
    python: str
    machine: str
    device: str

    def text(self) -> str:
        """As a file holds it, with a checksum."""
        return to_json(sealed(self.model_dump(mode="json")), indent=2) + "\n"

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what `text` gave.

        Raises:
            SourceError: missing, damaged, changed since, or no receipt.
        """
        content = read_content(file)
        if content is None:
            raise SourceError(f"there is no receipt {file}.", fix="check the path.")
        data = unsealed(parse_object(content, str(file)), str(file), is_sealed=True)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise SourceError(
                f"{file} is no receipt: {place}: {first['msg']}.",
                fix="get the file again, or make a receipt of your own.",
            ) from None


def digest_of_code() -> str:
    """SHA-256 over the names and contents of every source file of AutoQuant and its kernels."""
    import autoquant_kernels

    import autoquant

    rows = []
    for package in (autoquant, autoquant_kernels):
        root = Path(package.__path__[0])
        files = sorted(p for suffix in ("py", "cpp", "h") for p in root.rglob(f"*.{suffix}"))
        rows += [
            (f"{root.name}/{file.relative_to(root).as_posix()}", _sha256(file.read_bytes()))
            for file in files
        ]
    return _sha256(json.dumps(rows).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def differences(ours: Any, theirs: Any) -> list[str]:
    """Names of the values in which two parts differ."""
    own, other = ours.model_dump(), theirs.model_dump()
    return [name for name in own if own[name] != other[name]]
