"""The text of an export or a score that names none, and whose default cannot be had.

A search and its probes end with an error there: they decide by what they measure.
"""

from typing import TypeVar

from autoquant.data.hub import MIXTURE, is_reachable
from autoquant.data.text import STDLIB
from autoquant.run.config.parts import TextConfig
from autoquant.run.observer import Observer

Loaded = TypeVar("Loaded", bound=TextConfig)


def with_text(config: Loaded, observer: Observer) -> Loaded:
    """The configuration with text that is there.

    The default comes from the hub. Where the hub does not answer, the source of Python's standard
    library takes its place, and a warning says so.

    Args:
        config: unchanged if it names a text.
        observer: told of the other text.
    """
    if config.calibration is not None or config.text != MIXTURE or is_reachable():
        return config
    observer.warn(
        "the hub does not answer, which the usual text comes from: measured on the source code of "
        "Python's standard library instead. --calibration FILE or FOLDER gives text like yours."
    )
    return config.model_copy(update={"calibration": STDLIB})
