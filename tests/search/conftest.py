import pytest
from joint import small_problem


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Makes problems of one small model."""
    folder = tmp_path_factory.mktemp("small") / "model"
    return lambda **changes: small_problem(folder, **changes)
