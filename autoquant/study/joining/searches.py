"""Which search of a storage a worker joins."""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.storages import BaseStorage

from autoquant.errors import ConfigError
from autoquant.store.run_directory import differences
from autoquant.study.joining.link import ABOUT, BEAT, SUFFIX
from autoquant.study.joining.watch import Watch

_SCANS = 5
"""Looks at a storage after which every search that is in progress was heard of."""


class Searches(Watch):
    """The searches of a storage that workers may join. Use it as a context.

    Args:
        storage: where.
        about: what this worker must have in common with its search.
    """

    def __init__(self, storage: BaseStorage, about: Mapping[str, Any]) -> None:
        super().__init__(self._scan)
        self._storage, self._about = storage, about
        self._found: dict[str, Mapping[str, Any]] = {}
        """Attributes of the studies of workers, by their names."""
        self._beats: dict[str, Any] = {}
        self._live: set[str] = set()
        self._scans = 0

    def __enter__(self) -> "Searches":
        self._link.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._link.stop()

    def ours(self) -> str:
        """The name of the study of the search with the settings of this worker, when it is there.

        Raises:
            ConfigError: searches are in progress there, and each differs from this worker.
            RunConflict: the storage does not answer, or there is no search.
        """
        found = self._wait(self._ours)
        assert found is not None
        return found

    def _ours(self) -> str | None:
        others = {}
        for name in self._live:
            others[name] = differences(self._found[name].get(ABOUT) or {}, self._about)
            if not others[name]:
                return name
        if others and self._scans >= _SCANS:
            name = min(others, key=lambda each: (len(others[each]), each))
            raise ConfigError(
                f"the search {name.removesuffix(SUFFIX)!r} is another than this worker's: "
                f"{'; '.join(others[name])}. Its measurements cannot be put among the search's.",
                fix="give the worker the settings, model files, installation and kind of device "
                "of the search.",
            )
        return None

    def _scan(self) -> None:
        names = optuna.get_all_study_names(self._storage)
        found: dict[str, Mapping[str, Any]] = {
            name: optuna.load_study(study_name=name, storage=self._storage).user_attrs
            for name in names
            if name.endswith(SUFFIX)
        }
        beats = {name: attributes.get(BEAT) for name, attributes in found.items()}
        with self._link.changed:
            changed = {name for name in beats if self._beats.get(name, beats[name]) != beats[name]}
            self._live = (self._live | changed) & beats.keys()
            self._found, self._beats = found, beats
            self._scans += 1
