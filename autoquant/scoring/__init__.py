"""KL divergence of quantized models from their BF16 original, on fixed tokens."""
