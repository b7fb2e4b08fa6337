"""A study repeated in a storage of Optuna, where others see it: a database, or a gRPC proxy."""

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from urllib.parse import urlsplit

import optuna
from optuna.storages import BaseStorage

from autoquant.environment import redact
from autoquant.errors import ConfigError, RunConflict
from autoquant.search.quiet import quietly
from autoquant.study.journal import ABOUT

GRPC_PORT = 13000
"""That of `optuna.storages.run_grpc_proxy_server`."""

ANSWERS_WITHIN = 60.0
"""Seconds after which a storage that holds up a search counts as gone."""

READY_WITHIN = 10.0
"""Seconds in which a gRPC proxy begins to answer."""

_PACKAGES = (
    "`pip install grpcio protobuf` for grpc://, `pip install 'psycopg[binary]'` for postgresql://"
)


def open_storage(url: str) -> BaseStorage:
    """The storage at `url`: `grpc://HOST:PORT`, or what SQLAlchemy takes, as `sqlite:///FILE`.

    Raises:
        ConfigError: it is no such URL, or a package that it needs is not installed.
        RunConflict: the storage does not answer, or is read-only.
    """
    from sqlalchemy.exc import ArgumentError  # slow

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
                else optuna.storages.RDBStorage(_with_driver(url))
            )
            optuna.get_all_study_names(storage)
            _require_writable(storage)
    except (ImportError, ValueError, ArgumentError) as error:
        raise ConfigError(
            f"--study-storage {shown} cannot be used: {brief(error)}.",
            fix=f"mend the URL, or install what it needs: {_PACKAGES}.",
        ) from error
    except Exception as error:  # each kind of storage has errors of its own
        raise no_answer(f"the storage {shown}", error) from error
    return storage


def _require_writable(storage: BaseStorage) -> None:
    """Raises OperationalError: a file of SQLite that nothing can be written to."""
    if isinstance(storage, optuna.storages.RDBStorage) and storage.engine.name == "sqlite":
        with storage.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            connection.exec_driver_sql("CREATE TABLE autoquant_tries (x INTEGER)")
            connection.rollback()


class _Shared(Exception):
    """A study that somebody else adds to."""


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
    _is_shared: bool = field(default=False, init=False)
    """Whether another search adds to the study."""
    _call: threading.Thread | None = field(default=None, init=False)
    """The last one to the storage, which may hang there."""

    def send(self) -> None:
        """Add what the storage lacks, unless it went away.

        Raises:
            RunConflict: the storage has a study of the name that is another search's.
        """
        if self._is_away or self._is_shared:
            return
        try:
            self._add()
        except RunConflict:
            raise
        except _Shared:
            self._is_shared = True
            self.warn(
                f"another search adds its trials to the study {self.source.study_name!r} of this "
                "--study-storage, whose settings are the same. This one adds no more there, and "
                "study.log has all trials; give one of them another --study-storage."
            )
        except Exception as error:  # each kind of storage has errors of its own
            self._is_away, self._target = True, None
            self.warn(
                f"the study's storage {_how_it_fails(error)}: the search goes on, and study.log "
                "has all trials."
            )

    def finish(self) -> None:
        """Add what is left, and say what could not be added.

        Raises:
            RunConflict: the storage has a study of the name that is another search's.
        """
        if self._is_shared:
            return
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
            if self._target is None:
                self._in_time(self._open)
            assert self._target is not None
            for trial in trials[self._sent :]:
                self._in_time(partial(self._add_one, self._target, trial))
                self._sent += 1

    def _add_one(self, target: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Raises _Shared: the study has trials that this search has not added."""
        if len(target.get_trials(deepcopy=False)) != self._sent:
            raise _Shared
        target.add_trial(trial)

    def _in_time(self, call: Callable[[], None]) -> None:
        """Call the storage, and give up one that does not answer.

        Raises:
            TimeoutError: it hangs, in this call or in the one before.
            Exception: what the call raises.
        """
        failed: list[Exception] = []

        def run() -> None:
            try:
                call()
            except Exception as error:
                failed.append(error)

        if self._call is not None:
            _join(self._call)
        self._call = threading.Thread(target=run, daemon=True)  # a hanging one holds up no exit
        self._call.start()
        _join(self._call)
        if failed:
            raise failed[0]

    def _open(self) -> None:
        """Find or make the study of the same name, whose trials are the first of ours."""
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


def no_answer(storage: str, error: Exception) -> RunConflict:
    """Of a storage that is not there, or that takes nothing, when a command begins."""
    if _is_read_only(error):
        return RunConflict(
            f"{storage} is read-only: {brief(error)}.",
            fix="make the file and its folder writable, or give another --study-storage.",
        )
    return RunConflict(
        f"{storage} does not answer: {type(error).__name__}: {brief(error)}.",
        fix="start it; a search does without --study-storage too: study.log has all trials.",
    )


def _is_read_only(error: BaseException | None) -> bool:
    """Whether SQLite says so, in the error or in what it was raised from."""
    return error is not None and (
        "readonly database" in str(error) or _is_read_only(error.__cause__)
    )


def _how_it_fails(error: Exception) -> str:
    return "is read-only" if _is_read_only(error) else f"went away ({type(error).__name__})"


def _join(call: threading.Thread) -> None:
    call.join(ANSWERS_WITHIN)
    if call.is_alive():
        raise TimeoutError


def brief(error: Exception) -> str:
    """The first line of an error, without what a URL in it may carry."""
    return (redact(str(error)) or "").partition("\n")[0].rstrip(".")


def _digests(study: optuna.Study) -> list[object]:
    """Of what each trial measured."""
    return [trial.user_attrs.get("digest") for trial in study.get_trials(deepcopy=False)]


def _with_driver(url: str) -> str:
    """The URL with the driver that is installed, where it names none."""
    scheme, rest = url.split("://", 1)
    is_newer = scheme == "postgresql" and find_spec("psycopg2") is None
    return f"postgresql+psycopg://{rest}" if is_newer else url


def _proxy(host: str, port: int) -> BaseStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        proxy = optuna.storages.GrpcStorageProxy(host=host, port=port)
    proxy.wait_server_ready(timeout=READY_WITHIN)
    return proxy
