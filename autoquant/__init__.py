"""NVFP4, FP8 or BF16 for every layer of a language model, by measured KL.

`autoquant.search(...)` runs a search, `autoquant.load_run(path)` opens what one has left; both
return an `autoquant.Run`. Nothing heavy is imported before they are called.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from autoquant.api import Run as Run
    from autoquant.api import load_run as load_run
    from autoquant.api import search as search

_LAZY = {"Run": "autoquant.api", "load_run": "autoquant.api"}


def __getattr__(name: str) -> Any:
    if name == "search":
        return importlib.import_module("autoquant.search")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'autoquant' has no attribute {name!r}")
