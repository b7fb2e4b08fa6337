"""Which inputs of quantized linears are quantized: what the serving machine multiplies with."""

from enum import StrEnum

from autoquant.formats import Choice


class ActivationMode(StrEnum):
    """Which inputs are quantized besides the weights."""

    W4A4 = "w4a4"
    """Every quantized linear's input, as Blackwell serves."""
    W4A16 = "w4a16"
    """Inputs of eight bits only: four-bit weights meet BF16 inputs, as Hopper serves."""

    @property
    def fewest_bits(self) -> int:
        """Bits of the narrowest input that the machine multiplies."""
        return 4 if self is ActivationMode.W4A4 else 8

    def quantizes_input(self, choice: Choice) -> bool:
        """Whether a linear under `choice` sees a quantized input."""
        return not choice.keeps_input and choice.format.input_bits >= self.fewest_bits
