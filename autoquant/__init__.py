"""AutoQuant: NVFP4, FP8 or BF16 for every layer of a language model, by measured KL."""

__version__ = "0.1.0"
