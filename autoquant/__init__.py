"""NVFP4, FP8 or BF16 for every layer of a language model, by measured KL.

`autoquant.search(...)` runs a search, `autoquant.search_budgets(...)` one for each of several
budgets, and `autoquant.load_run(path)` opens what one has left; each gives an `autoquant.Run`.
Nothing heavy is imported before they are called.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from autoquant.api import Run as Run
    from autoquant.api import load_run as load_run
    from autoquant.api import search as search
    from autoquant.api import search_budgets as search_budgets

_LAZY = dict.fromkeys(("Run", "load_run", "search_budgets"), "autoquant.api")


def __getattr__(name: str) -> Any:
    if name == "search":
        return importlib.import_module("autoquant.search")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'autoquant' has no attribute {name!r}")
