"""The text of a command that names none, and whose default cannot be had."""

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from autoquant.data.hub import MIXTURE, is_reachable
from autoquant.data.text import STDLIB
from autoquant.run.config.parts import LoadedConfig
from autoquant.run.observer import Observer
from autoquant.store.run_directory import read_identity

Loaded = TypeVar("Loaded", bound=LoadedConfig)


def with_text(config: Loaded, observer: Observer, begun: Iterable[Path] = ()) -> Loaded:
    """The configuration with text that is there.

    The default comes from the hub. Where the hub does not answer, the source of Python's standard
    library takes its place, and a warning says so. A run that has begun keeps its text.

    Args:
        config: unchanged if it names a text.
        observer: told of the other text.
        begun: run directories that the command may go on with.
    """
    if config.calibration is not None or config.text != MIXTURE:
        return config
    stdlib = config.model_copy(update={"calibration": STDLIB})
    for path in begun:
        identity = read_identity(path)
        if identity is not None:
            return stdlib if identity["signature"].get("calibration") == STDLIB else config
    if is_reachable():
        return config
    observer.warn(
        "the hub does not answer, which the usual text comes from: measured on the source code of "
        "Python's standard library instead. --calibration FILE or FOLDER gives text like yours."
    )
    return stdlib
