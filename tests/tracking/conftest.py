"""A store with its tables, and a search recorded in it."""

import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from recorded import Search


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables made, which takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}")
    return path


@pytest.fixture
def runs(tmp_path: Path, empty_store: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


@pytest.fixture
def search(runs: Path) -> Search:
    return Search(runs / "a")
