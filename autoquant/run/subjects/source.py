"""The model that a checkpoint was made from, by what lies around it."""

from pathlib import Path

from autoquant.errors import ConfigError
from autoquant.run.config import SearchConfig
from autoquant.run.config.file import read_settings
from autoquant.source.declared import base_model
from autoquant.source.source import REFERENCE_MODEL, Source, open_source
from autoquant.store.run_directory import CONFIG, IDENTITY


def source_of(checkpoint: Path, named: str | None, revision: str | None) -> Source:
    """The model as it is named; else that of the run directory, or of the checkpoint's card.

    Raises:
        ConfigError: nothing says which it is.
        SourceError: it is missing, damaged or not understood.
    """
    if named is not None:
        return open_source(named, revision=revision)
    run = checkpoint.resolve().parent
    if (run / IDENTITY).is_file():
        settings = read_settings(run / CONFIG, SearchConfig)
        return open_source(
            settings.get("model", REFERENCE_MODEL), revision=settings.get("revision")
        )
    card = base_model(checkpoint)
    if card is None:
        raise ConfigError(
            f"nothing beside {checkpoint} says which model it was made from.",
            fix="name it with --source.",
        )
    return open_source(card, revision=revision)
