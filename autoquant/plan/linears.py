"""Layer groups: the linears that serving engines fuse, and so must share a format."""

from dataclasses import dataclass, field
from functools import cached_property

from autoquant.formats import BF16, Choice, Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One weight matrix of the checkpoint, by its name on disk."""

    name: str
    """Module name on disk: `model.layers.3.self_attn.q_proj`."""
    out_features: int
    in_features: int
    weight_scale_set: str
    """Linears of the same set share a bit-identical weight scale (`weight_scale_2`)."""
    input_scale_set: str
    """Linears of the same set share a bit-identical `input_scale`."""
    is_known: bool = False
    """Whether an engine's own table says what the linear is joined with, if with anything."""
    casts_to: str = ""
    """The format that keeps the codes which the source stores; empty if none does."""
    engine_names: tuple[str, ...] = ()
    """What else engines call the matrix that holds it: the one in which they join it with others,
    or a name that is not its path. Empty if its own name is all."""
    tensor: str = ""
    """Tensor name on disk; `{name}.weight` unless the checkpoint says otherwise."""

    def __post_init__(self) -> None:
        if not self.tensor:
            object.__setattr__(self, "tensor", f"{self.name}.weight")

    @property
    def elements(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Linears that must share a format, because serving engines fuse them."""

    name: str
    """Checkpoint name up to the fused part: `model.layers.3.self_attn.qkv`."""
    role: str
    """What the group does in its block: `qkv`, `o`, `gate_up`, `down`, `experts`, `head`, ..."""
    layer: int | None
    """Index of the decoder block, or None outside of them."""
    linears: tuple[Linear, ...] = field(repr=False)
    closed: str = ""
    """Why engines load the group in BF16 only; empty if they load every format."""
    caution: str = ""
    """Engines that load the group in BF16 only, although another one loads every format."""

    @cached_property
    def elements(self) -> int:
        """Stored elements of all members, padding excluded."""
        return sum(linear.elements for linear in self.linears)

    @cached_property
    def input_sets(self) -> tuple[str, ...]:
        """The input scale sets of all members, in their order."""
        return tuple(dict.fromkeys(linear.input_scale_set for linear in self.linears))

    def bytes_under(self, choice: Choice) -> int:
        """Bytes of every tensor that the members store under `choice`, scales included."""
        stored = choice.format.stored_bytes
        return sum(stored(own.out_features, own.in_features, choice) for own in self.linears)

    @cached_property
    def casts_to(self) -> str:
        """The format that keeps the codes of every linear; empty if none does."""
        formats = {linear.casts_to for linear in self.linears}
        return formats.pop() if len(formats) == 1 else ""

    def why_not(self, choice: Choice) -> str | None:
        """Why the group cannot take `choice`, or None if it can."""
        if choice.is_cast and choice.format.name != self.casts_to:
            return f"its source stores no codes that {choice.format} could keep"
        return self.why_illegal(choice.format)

    def why_illegal(self, format: Format) -> str | None:
        """Why the group cannot take `format`, or None if it can."""
        if self.closed and format != BF16.format:
            return self.closed
        for linear in self.linears:
            reason = format.why_illegal(linear.out_features, linear.in_features)
            if reason is not None:
                return f"{linear.name}: {reason}"
        return None
