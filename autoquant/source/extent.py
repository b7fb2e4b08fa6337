"""How large a model a config may describe.

A config is a few numbers that anyone can write. Ten million layers would be built for hours before
their weights were missed, and a width of a billion would take the machine's memory.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from autoquant.errors import SourceError
from autoquant.source.headers import Headers

_COUNTS_OF_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")

_COUNT_OF_LABELS = "num_labels"
_MOST_LABELS = 100_000
"""transformers names every one, also for a model without a classifier."""

_MODULES_PER_TENSOR = 100
_MODULES_BESIDE = 10_000
"""A layer that multiplies has one or two tensors; experts that a file joins may be modules of
their own."""

_ELEMENTS_BESIDE = 2**26
"""Of position tables and masks, which no checkpoint stores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The most that a model may have."""

    layers: int
    modules: int
    elements: int
    """Of parameters and buffers."""
    because: str
    """Where the limits come from, as a clause."""

    @classmethod
    def of(cls, headers: Headers) -> Self:
        """What weights can fill: a layer has a tensor of its own, and a head may be tied."""
        return cls(
            layers=len(headers),
            modules=_MODULES_BESIDE + _MODULES_PER_TENSOR * len(headers),
            elements=_ELEMENTS_BESIDE + 4 * headers.elements,
            because=f"its weights are {len(headers):,} tensors of {headers.elements:,} elements",
        )

    def require_layers(self, config: Mapping[str, Any]) -> None:
        """Check config.json before transformers makes lists as long as the model.

        Raises:
            SourceError: more layers or labels than may be.
        """
        for key, value in config.items():
            if isinstance(value, dict):
                self.require_layers(value)
            elif not isinstance(value, (int, float)):
                continue
            elif key in _COUNTS_OF_LAYERS and value > self.layers:
                raise self._exceeded(f"{value:,} layers ({key})")
            elif key == _COUNT_OF_LABELS and value > _MOST_LABELS:
                raise self._exceeded(f"{value:,} labels ({key})")

    @contextmanager
    def building(self) -> Iterator[None]:
        """Stop this thread from building a model of more modules than may be.

        Raises:
            SourceError: it was about to.
        """
        from torch.nn.modules.module import register_module_module_registration_hook

        built, thread = 0, threading.get_ident()

        def count(*_: Any) -> None:
            nonlocal built
            built += threading.get_ident() == thread
            if built > self.modules:
                raise self._exceeded(f"more than {self.modules:,} modules")

        handle = register_module_module_registration_hook(count)
        try:
            yield
        finally:
            handle.remove()

    def require_elements(self, model: Any) -> None:
        """Check a model on the meta device before its tensors are allocated.

        Raises:
            SourceError: more elements than may be.
        """
        described = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
        if described > self.elements:
            raise self._exceeded(f"a model of {described:,} elements")

    def _exceeded(self, what: str) -> SourceError:
        return SourceError(
            f"config.json describes {what}; {self.because}.",
            fix="check that config.json belongs to these weights.",
        )


LARGEST = Extent(
    layers=1_000,
    modules=200_000,
    elements=2**50,
    because="no model of which nothing but the config is there may be as large",
)
"""Of a model without weights: ten times the layers of the deepest that is published."""
