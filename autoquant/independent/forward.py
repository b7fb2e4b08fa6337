"""KL of a checkpoint by transformers' own model, held against what scoring has said of it.

Shapes: S sequences, L tokens, V vocabulary.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from autoquant.errors import SourceError, first_line
from autoquant.independent.products import Products
from autoquant.independent.stored import StoredModel, read_stored, read_tensors

_SLACK = 0.03
"""Part of a KL by which two right forwards may differ whatever the noise."""

_DEVIATIONS = 4
"""Standard errors of the mean difference over sequences that are no fault."""


_JOINED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parts, along N, of tensors that hold all experts of a layer."""

_NOTHING = StoredModel(tensors={}, inputs={}, quantized=frozenset())


_FEWEST_BITS = {"w4a4": 4, "w4a16": 8, "a16": 16}
"""Bits of the narrowest input that each kind of machine rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What scoring has measured of a checkpoint on a few tokens; kept in autoquant.json."""

    sequences: tuple[tuple[int, ...], ...]
    """Token ids, all of one length."""
    kl: tuple[float, ...]
    """Mean KL(BF16 || quantized) of each sequence, nats per token."""
    activation_mode: str
    """`w4a4`, `w4a16` where inputs of NVFP4 layers stay in BF16, or `a16` where all do."""
    kv_cache: str
    """Format of keys and values."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Self:
        """What `to_dict` gave.

        Raises:
            SourceError: something is missing.
        """
        try:
            return cls(
                sequences=tuple(tuple(row) for row in content["sequences"]),
                kl=tuple(content["kl"]),
                activation_mode=content["activation_mode"],
                kv_cache=content["kv_cache"],
            )
        except (KeyError, TypeError) as error:
            raise SourceError(
                f"autoquant.json holds a damaged measurement of the checkpoint: {error}.",
                fix="export it again.",
            ) from None

    def rounds(self, bits: int) -> bool:
        """Whether inputs of so many bits are rounded."""
        return bits >= _FEWEST_BITS[self.activation_mode]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """A checkpoint's KL by independent eyes beside the one that was said."""

    kl: float
    """Nats per token, by transformers' own model."""
    said: float
    """By scoring, on the same tokens."""
    tokens: int
    unused: tuple[str, ...] = field(default=(), repr=False)
    """Quantized linears that no product of the model multiplied with."""
    allowed: float
    """Largest difference of the two that is no fault, nats per token."""

    @property
    def problem(self) -> str | None:
        """What is wrong, in a line; None where the two agree."""
        if abs(self.kl - self.said) <= self.allowed:
            return None
        return (
            f"transformers' own forward of the stored weights gives KL {self.kl:.6g} on "
            f"{self.tokens} tokens, and scoring said {self.said:.6g} (up to {self.allowed:.2g} "
            "apart is noise)."
        )

    @property
    def note(self) -> str | None:
        """What is no fault, and worth knowing."""
        if not self.unused:
            return None
        return (
            f"{len(self.unused)} quantized linears took part in no product of transformers' own "
            f"forward, such as {self.unused[0]}: these tokens say nothing of them."
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; KL in nats per token."""
        return {"kl": self.kl, "said": self.said, "allowed": self.allowed, "tokens": self.tokens}


def run_checkpoint(
    checkpoint: Path,
    source: Path,
    evidence: Evidence,
    *,
    device: torch.device,
    weights: Mapping[str, Tensor] | None = None,
) -> Agreement:
    """Run a model and its checkpoint, one after the other, and compare.

    Args:
        checkpoint: a folder that an export has written.
        source: the model that it was made from.
        evidence: tokens, and what was measured on them.
        device: where to run.
        weights: of the source by name, where transformers does not read its files: codes.

    Raises:
        SourceError: transformers cannot load one of the two.
    """
    tokens = torch.tensor(evidence.sequences)
    plain = dict(weights) if weights is not None else read_tensors(source)
    model = OwnModel(source, plain, _NOTHING, evidence.rounds, device)
    reference = [model.log_probabilities(row).cpu() for row in tokens]
    del model
    model = OwnModel.of_checkpoint(checkpoint, plain, evidence.rounds, device)
    del plain
    rows = zip(reference, tokens, strict=True)
    kl = torch.stack([token_kl(p, model.log_probabilities(row).cpu()).mean() for p, row in rows])
    said = torch.tensor(evidence.kl, dtype=torch.float64)
    return Agreement(
        kl=kl.mean().item(),
        said=said.mean().item(),
        tokens=tokens.numel(),
        unused=model.unused(),
        allowed=_allowed(kl - said, said.mean().item()),
    )


class OwnModel:
    """transformers' own model of a folder, with the weights that files hold.

    Args:
        folder: its config.json names the class.
        state: weights by their names on disk.
        stored: what of them a checkpoint quantizes.
        rounds: whether inputs of so many bits are rounded where it is served.
        device: where to run.

    Raises:
        SourceError: transformers cannot load it.
    """

    def __init__(
        self,
        folder: Path,
        state: Mapping[str, Tensor],
        stored: StoredModel,
        rounds: Callable[[int], bool],
        device: torch.device,
    ) -> None:
        self._model = _model(folder, state, device)
        self._stored = stored
        self._device = device
        self._products = Products(stored, self._model, rounds)

    @classmethod
    def of_source(cls, source: Path, device: torch.device) -> Self:
        """The model that checkpoints are made from."""
        return cls(source, read_tensors(source), _NOTHING, lambda bits: False, device)

    @classmethod
    def of_checkpoint(
        cls,
        checkpoint: Path,
        source: Mapping[str, Tensor],
        rounds: Callable[[int], bool],
        device: torch.device,
    ) -> Self:
        """A checkpoint, by whatever tool wrote it; `source` are the weights it was made from."""
        stored = read_stored(checkpoint)
        return cls(checkpoint, _as_in_source(stored, source), stored, rounds, device)

    @torch.inference_mode()
    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """Of the next token at each position of a sequence [L], float32 [L, V] on the device."""
        with self._products:
            logits = self._model(input_ids=tokens[None].to(self._device), use_cache=False).logits
        return torch.as_tensor(logits[0].float().log_softmax(-1))

    def unused(self) -> tuple[str, ...]:
        """Quantized linears that no product so far multiplied with, in order of their names."""
        tensors, quantized = self._stored.tensors, self._stored.quantized
        return tuple(
            name
            for name in sorted(quantized - self._products.used)
            if ".experts." not in name and _is_in(self._model, tensors[f"{name}.weight"])
        )


def token_kl(reference: Tensor, other: Tensor) -> Tensor:
    """KL of two distributions at each position, nats, float64 [L], of log-probabilities [L, V]."""
    reference = reference.double()
    return (reference.exp() * (reference - other.double())).sum(-1)


def _as_in_source(stored: StoredModel, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors with experts joined where the source joins them.

    How the source lays an expert out, [N, K] or [K, N], is seen by which of the two is like it.
    """
    state = dict(stored.tensors)
    for name, whole in source.items():
        container, _, product = name.rpartition(".")
        parts = _JOINED.get(product, ())
        if name in state or whole.ndim != 3 or not parts:
            continue
        experts = []
        for index, original in enumerate(whole):
            own = [state.pop(f"{container}.{index}.{part}.weight") for part in parts]
            experts.append(_like(torch.cat(own), original))
        state[name] = torch.stack(experts)
    return state


def _like(matrix: Tensor, original: Tensor) -> Tensor:
    """A matrix, or its transpose, whichever is nearer to the original."""
    ways = [way for way in (matrix, matrix.t()) if way.shape == original.shape]
    wide = original.float()
    return min(ways, key=lambda way: (way.float() - wide).norm().item()).contiguous()


def _is_in(model: Any, weight: Tensor) -> bool:
    """Whether the model has a parameter of that shape and content: draft layers are not built."""
    return any(
        own.shape == weight.shape and torch.equal(own.cpu(), weight) for own in model.parameters()
    )


def _allowed(differences: Tensor, said: float) -> float:
    """What rounding in another order may change, by how it scatters over sequences."""
    error = differences.std().item() / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return _SLACK * said + _DEVIATIONS * error


def _model(folder: Path, state: Mapping[str, Tensor], device: torch.device) -> Any:
    """transformers' model of a folder's config.json with weights by their names on disk."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        kind = _class_of(folder, config)
        model, report = kind.from_pretrained(
            None, config=config, state_dict=dict(state), dtype=torch.bfloat16,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # model code raises anything
        line = first_line(error)
        raise SourceError(
            f"transformers cannot load {folder}: {line}", fix="leave --forward out."
        ) from error
    missing = [*report["missing_keys"], *map(str, report["mismatched_keys"])]
    if missing:
        raise SourceError(
            f"transformers misses {len(missing)} weights of {folder}, such as {missing[0]}.",
            fix="export the checkpoint again.",
        )
    model = model.to(device).eval().requires_grad_(False)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def _class_of(folder: Path, config: Any) -> Any:
    """The class that config.json names, or transformers' own for a config that names none."""
    import transformers

    said = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
    kind = getattr(transformers, said[0], None) if said else None
    if kind is not None:
        return kind
    with torch.device("meta"):
        return type(transformers.AutoModelForCausalLM.from_config(config))
