"""A study repeated in a storage of Optuna, where others see it: a database, or a gRPC proxy."""

from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import optuna
from optuna.storages import BaseStorage
from sqlalchemy.exc import ArgumentError

from autoquant.environment import redact
from autoquant.errors import ConfigError, RunConflict
from autoquant.search.quiet import quietly
from autoquant.study.journal import ABOUT

GRPC_PORT = 13000
"""That of `optuna.storages.run_grpc_proxy_server`."""

_PACKAGES = "`pip install grpcio protobuf` for grpc://, psycopg2 for postgresql://"


def open_storage(url: str) -> BaseStorage:
    """The storage at `url`: `grpc://HOST:PORT`, or what SQLAlchemy takes, as `sqlite:///FILE`.

    Raises:
        ConfigError: it is no such URL, or a package that it needs is not installed.
        RunConflict: the storage does not answer.
    """
    shown, parts = redact(url), urlsplit(url)
    if not parts.scheme or "://" not in url:
        raise ConfigError(
            f"--study-storage {shown} is no URL.",
            fix="write sqlite:///FILE, postgresql://USER@HOST/NAME or grpc://HOST:PORT.",
        )
    try:
        with quietly():
            storage: BaseStorage = (
                _proxy(parts.hostname or "localhost", parts.port or GRPC_PORT)
                if parts.scheme == "grpc"
                else optuna.storages.RDBStorage(url)
            )
            optuna.get_all_study_names(storage)
    except (ImportError, ValueError, ArgumentError) as error:
        raise ConfigError(
            f"--study-storage {shown} cannot be used: {_brief(error)}.",
            fix=f"mend the URL, or install what it needs: {_PACKAGES}.",
        ) from error
    except Exception as error:  # each kind of storage has errors of its own
        raise RunConflict(
            f"the storage {shown} does not answer: {type(error).__name__}: {_brief(error)}.",
            fix="start it, or leave --study-storage out: study.log has all trials.",
        ) from error
    return storage


@dataclass(kw_only=True)
class Mirror:
    """Adds the trials of a study to another of its name, each once, in their order.

    A storage that goes away ends no search: what it lacks is added at the end, or by the same
    command later.
    """

    source: optuna.Study
    """In the run directory."""
    storage: BaseStorage
    warn: Callable[[str], None]
    _target: optuna.Study | None = field(default=None, init=False)
    _sent: int = field(default=0, init=False)
    _is_away: bool = field(default=False, init=False)

    def send(self) -> None:
        """Add what the storage lacks, unless it went away.

        Raises:
            RunConflict: the storage has a study of the name that is another search's.
        """
        if self._is_away:
            return
        try:
            self._add()
        except RunConflict:
            raise
        except Exception as error:  # each kind of storage has errors of its own
            self._is_away = True
            self.warn(
                f"the study's storage went away ({type(error).__name__}): the search goes on, and "
                "study.log has all trials."
            )

    def finish(self) -> None:
        """Add what is left, and say what could not be added.

        Raises:
            RunConflict: the storage has a study of the name that is another search's.
        """
        was_away, self._is_away = self._is_away, False
        warn, self.warn = self.warn, lambda _: None
        try:
            self.send()
        finally:
            self.warn = warn
        left = len(self.source.get_trials(deepcopy=False)) - self._sent
        if left:
            self.warn(f"{left} trials are not in the study's storage; the same command adds them.")
        elif was_away:
            self.warn("the study's storage is back, and has all trials.")

    def _add(self) -> None:
        trials = self.source.get_trials(deepcopy=False)
        with quietly():
            target = self._target or self._open()
            for trial in trials[self._sent :]:
                target.add_trial(trial)
                self._sent += 1

    def _open(self) -> optuna.Study:
        """The study of the same name, whose trials are the first of ours."""
        name, about = self.source.study_name, self.source.user_attrs[ABOUT]
        target = optuna.create_study(storage=self.storage, study_name=name, load_if_exists=True)
        if not target.user_attrs:
            target.set_user_attr(ABOUT, about)
        theirs, ours = _digests(target), _digests(self.source)
        if target.user_attrs.get(ABOUT) != about or theirs != ours[: len(theirs)]:
            raise RunConflict(
                f"the storage has a study {name!r} with other trials than this search's.",
                fix="give another --study-storage, or delete the study (`optuna delete-study`).",
            )
        self._target, self._sent = target, len(theirs)
        return target


def _brief(error: Exception) -> str:
    """The first line of an error, without what a URL in it may carry."""
    return (redact(str(error)) or "").partition("\n")[0].rstrip(".")


def _digests(study: optuna.Study) -> list[object]:
    """Of what each trial measured."""
    return [trial.user_attrs.get("digest") for trial in study.get_trials(deepcopy=False)]


def _proxy(host: str, port: int) -> BaseStorage:
    proxy = optuna.storages.GrpcStorageProxy(host=host, port=port)
    proxy.wait_server_ready(timeout=10.0)
    return proxy
