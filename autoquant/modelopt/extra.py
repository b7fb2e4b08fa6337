"""ModelOpt itself, imported when it is first needed: that takes seconds."""

import importlib
import warnings
from typing import Any

from autoquant.errors import ConfigError


def imported(module: str = "modelopt.torch.quantization") -> Any:
    """A module of NVIDIA ModelOpt.

    Raises:
        ConfigError: it is not installed, or does not work with what is.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="transformers .* is not tested")
            return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"NVIDIA ModelOpt cannot be imported: {error}.",
            fix="install it with AutoQuant's extra: pip install 'autoquant[modelopt]'.",
        ) from error
