"""Which machine serves, and so which inputs of quantized linears are quantized."""

from enum import StrEnum

from autoquant.formats import Choice


class ActivationMode(StrEnum):
    """Which inputs are quantized besides the weights."""

    W4A4 = "w4a4"
    """Every quantized linear's input."""
    W4A16 = "w4a16"
    """Inputs of eight bits only: four-bit weights meet BF16 inputs."""
    A16 = "a16"
    """None: all weights meet BF16 inputs."""

    @property
    def fewest_bits(self) -> int:
        """Bits of the narrowest input that the machine multiplies."""
        return {ActivationMode.W4A4: 4, ActivationMode.W4A16: 8, ActivationMode.A16: 16}[self]

    def quantizes_input(self, choice: Choice) -> bool:
        """Whether a linear under `choice` sees a quantized input."""
        return not choice.keeps_input and choice.format.input_bits >= self.fewest_bits


class Target(StrEnum):
    """The machine that serves a checkpoint, by its generation of NVIDIA's GPUs."""

    BLACKWELL = "blackwell"
    """Multiplies inputs in NVFP4 and FP8."""
    HOPPER = "hopper"
    """Multiplies inputs in FP8; weights in NVFP4 meet BF16 inputs."""
    AMPERE = "ampere"
    """Multiplies in BF16 alone."""

    @property
    def mode(self) -> ActivationMode:
        """Which inputs it quantizes."""
        return _MODES[self]

    @classmethod
    def of(cls, mode: ActivationMode) -> "Target":
        """The machine that quantizes these inputs."""
        return next(target for target, own in _MODES.items() if own is mode)


_MODES = {
    Target.BLACKWELL: ActivationMode.W4A4,
    Target.HOPPER: ActivationMode.W4A16,
    Target.AMPERE: ActivationMode.A16,
}
