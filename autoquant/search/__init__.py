"""From sensitivities to one confirmed assignment.

The package is callable: `autoquant.search(...)` is `autoquant.api.search`. A plain function of that
name would be shadowed by this package as soon as a module of it is imported.
"""

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from autoquant.api import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
