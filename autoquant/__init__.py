"""NVFP4, FP8 or BF16 for every layer of a language model, by measured KL.

`autoquant.search(...)` runs a search, `autoquant.search_budgets(...)` one for each of several
budgets, and `autoquant.load_run(path)` opens what one has left; each gives an `autoquant.Run`.
`autoquant.equalized_copy(...)` makes a model ready for 4-bit inputs.
Nothing heavy is imported before they are called.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from autoquant.api import Run as Run
    from autoquant.api import equalized_copy as equalized_copy
    from autoquant.api import load_run as load_run
    from autoquant.api import search as search
    from autoquant.api import search_budgets as search_budgets

_LAZY = frozenset({"Run", "equalized_copy", "load_run", "search_budgets"})


def _of_api(name: str) -> Any:
    return getattr(importlib.import_module("autoquant.api"), name)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return _of_api(name)
    raise AttributeError(f"module 'autoquant' has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps `autoquant.search` the function: importing the package `autoquant.search` would bind
    its name here to the package. `from autoquant.search.problem import ...` works as ever.
    """

    @property
    def search(self) -> Any:
        """`autoquant.api.search`."""
        return _of_api("search")

    @search.setter
    def search(self, package: ModuleType) -> None:
        """Ignore what the import system binds."""


sys.modules[__name__].__class__ = _Package
