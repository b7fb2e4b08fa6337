"""What every test runs under: no network, no settings of the person who runs it."""

import gc
import os
import signal
from collections.abc import Callable, Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors lose more to threads than they gain

import pytest
from click.testing import CliRunner, Result
from hypothesis import settings

from autoquant.cli import cli

settings.register_profile("autoquant", deadline=None)  # a busy machine is no failure
settings.load_profile("autoquant")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no process ends with one while others have nothing."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "AUTOQUANT_KERNELS", "AUTOQUANT_CPU_PRODUCTS", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def autoquant() -> Callable[..., Result]:
    """Call `autoquant` with these arguments in this process."""

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    return call


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Makes problems of one small model."""
    from joint import small_problem

    folder = tmp_path_factory.mktemp("small") / "model"
    return lambda **changes: small_problem(folder, **changes)


# A runner in the background of a script is started with interrupts ignored, and so would be the
# commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What the files of tests import stays: no collection finds anything before the first test.
gc.disable()
